from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["NVFP4Tensor"]


class NVFP4Tensor(NamedTuple):
    """The parts of an NVFP4 tensor; its value is ``e2m1(q) * block_scale * global_scale``.

    A plain named tuple: it travels through ``torch.compile`` and pytrees as its parts do.

    >>> from n3kernels import nvfp4
    >>> w = nvfp4.quantize(torch.randn(8, 32))
    >>> w.shape, w.dequantize().dtype
    ((8, 32), torch.bfloat16)
    """

    q: Tensor  # uint8 [..., N, K/2], low nibble = even k
    block_scale: Tensor  # float8_e4m3fn [..., N, K/16], or the 128x4 tiles of all rows
    global_scale: Tensor  # float32: 1 element, or shape[:i] for some i: [E] of a stack, [..., N] of rows
    scale_layout: str  # "linear" or "128x4"
    shape: tuple[int, ...]  # [..., N, K]

    @classmethod
    def from_parts(
        cls,
        q: Tensor,
        block_scale: Tensor,
        global_scale: Tensor,
        *,
        scale_layout: str = "linear",
        inverse: bool = False,
    ) -> NVFP4Tensor:
        """Wraps existing parts; ``inverse`` for a global scale kept as its inverse, 2688/amax (vLLM, FlashInfer)."""
        decode_scale = torch.ones_like(global_scale) / global_scale if inverse else global_scale
        return cls(q, block_scale, decode_scale, scale_layout, (*q.shape[:-1], q.shape[-1] * 2))

    @classmethod
    def stack(cls, tensors: Sequence[NVFP4Tensor]) -> NVFP4Tensor:
        """One ``[E, N, K]`` tensor, global scales ``[E]``, of E matrices: the experts of a layer."""
        parts = [t.to_layout("linear") for t in tensors]
        scales = torch.stack([t.block_scale.view(torch.uint8) for t in parts]).view(torch.float8_e4m3fn)
        global_scale = torch.stack([t.global_scale.reshape(()) for t in parts])
        return cls.from_parts(torch.stack([t.q for t in parts]), scales, global_scale)

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """The value in ``dtype``; see `n3kernels.nvfp4.dequantize`."""
        return torch.ops.n3.nvfp4_dequantize.default(
            self.q, self.block_scale, self.global_scale, dtype=dtype, scale_layout=self.scale_layout
        )

    def to(self, device: torch.device | str) -> NVFP4Tensor:
        """The same tensor on another device. (Another dtype is what `dequantize` gives.)"""
        if isinstance(device, torch.dtype):
            raise TypeError(f"NVFP4Tensor.to: device must be a device, got {device}: dequantize(dtype) gives values")
        parts = {name: getattr(self, name).to(device) for name in ("q", "block_scale", "global_scale")}
        return self._replace(**parts)

    def __reduce__(self):
        # Torch's own pickles of float8 tensors need torch.save; and weights_only=True must know what to call.
        parts = self._replace(block_scale=self.block_scale.view(torch.uint8))
        return _from_bytes, tuple(parts)

    def to_layout(self, scale_layout: str) -> NVFP4Tensor:
        """The same tensor with its block scales in another layout, ``"linear"`` or ``"128x4"``."""
        if scale_layout == self.scale_layout:
            return self
        if scale_layout == "128x4":
            scale = torch.ops.n3.nvfp4_swizzle_scale.default(self.block_scale.flatten(0, -2))
        elif scale_layout == "linear":
            *lead, k = self.shape
            rows = self.q.numel() // self.q.shape[-1] if k else 0
            scale = torch.ops.n3.nvfp4_unswizzle_scale.default(self.block_scale, rows, k // 16).view(*lead, k // 16)
        else:
            raise ValueError(f"NVFP4Tensor.to_layout: scale_layout must be one of linear, 128x4, got {scale_layout}")
        return self._replace(block_scale=scale, scale_layout=scale_layout)


def _from_bytes(q: Tensor, block_scale: Tensor, *rest) -> NVFP4Tensor:
    return NVFP4Tensor(q, block_scale.view(torch.float8_e4m3fn), *rest)


torch.serialization.add_safe_globals([NVFP4Tensor, _from_bytes])
