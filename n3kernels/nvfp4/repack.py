from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference_repack
from .tensor import NVFP4Tensor

__all__ = ["PackedNVFP4", "prepack"]


class PackedNVFP4(NamedTuple):
    """NVFP4 weights ``[N, K]`` in the order of a GPU's tensor cores, for `n3kernels.nvfp4.linear`.

    A plain named tuple: it travels through ``torch.compile`` and pytrees as its parts do. The blob takes 4.5 bits per
    weight, N rounded up to 16, K to 64.

    >>> from n3kernels import nvfp4
    >>> w = nvfp4.quantize(torch.randn(24, 48))
    >>> bool((nvfp4.prepack(w).unpack().dequantize() == w.dequantize()).all())
    True
    """

    blob: Tensor  # uint8 [ceil(N / 16), 576 ceil(K / 64) + 64]
    global_scale: Tensor  # float32, 1 element
    shape: tuple[int, int]  # [N, K]

    def unpack(self) -> NVFP4Tensor:
        """The same values in the canonical layout. A scale that was negative is positive, over codes of the other
        sign; codes under a zero scale are 0 or -0."""
        return NVFP4Tensor.from_parts(*reference_repack.unpack(self.blob, *self.shape), self.global_scale)

    def to(self, device: torch.device | str) -> PackedNVFP4:
        """The same weights on another device."""
        return self._replace(blob=self.blob.to(device), global_scale=self.global_scale.to(device))


def prepack(w: NVFP4Tensor) -> PackedNVFP4:
    """Returns ``w`` with codes and scales in the order of operand ``a`` of sm_80's and later matrix instructions.

    To be done once, when a checkpoint is loaded. Weights that change are packed anew: the canonical layout stays the
    source of truth, and `PackedNVFP4.unpack` gives it back, value for value.

    Args:
        w: ``[N, K]``, any N, K a positive multiple of 16; 1 global scale; linear scales (others are unswizzled first).
    Returns:
        `PackedNVFP4`. Exact: signs of scales are folded into the codes, zero scales into their magnitudes; a NaN scale
        stays, and makes its row's output NaN. A function of ``w`` alone: the bytes are the same on every backend.
    Raises:
        RuntimeError: a shape or dtype outside the above; the message names argument and values.
    Source: the layout is this library's own; docs/nvfp4.md describes it.

    >>> from n3kernels import nvfp4
    >>> prepack(nvfp4.quantize(torch.randn(24, 48))).blob.shape
    torch.Size([2, 640])
    """
    w = w.to_layout("linear")
    check = Check("nvfp4_repack")
    check.that(w.global_scale.numel() == 1, "global_scale must have 1 element", w.global_scale.numel())
    return PackedNVFP4(torch.ops.n3.nvfp4_repack.default(w.q, w.block_scale), w.global_scale, tuple(w.shape))


def _check(q, block_scale):
    check = Check("nvfp4_repack")
    check.dtype("q", q, torch.uint8)
    check.dtype("block_scale", block_scale, torch.float8_e4m3fn)
    check.dim("q", q, 2)
    n, half = q.shape
    check.that(half > 0 and half % 8 == 0, "q must have a last dimension that is a positive multiple of 8", half)
    check.shape("block_scale", block_scale, (n, half // 8))
    check.same_device("q", q, block_scale=block_scale)


def _fake(q, block_scale):
    return q.new_empty(reference_repack.blob_shape(q.shape[0], q.shape[1] * 2))


_dispatch.register(
    "nvfp4_repack",
    check=_check,
    fake=_fake,
    reference=reference_repack.nvfp4_repack,
    missing={"triton": "the blob is for CUDA kernels, and packed once: the reference packs it"},
)
