"""Modules that hold weights as NVFP4 and FP8 checkpoints store them, where a dense model has a linear layer, an
embedding or stacked experts. Their buffers carry the checkpoint's names and bytes, so that saving gives them back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nemotron.config import CheckpointError
from ...nvfp4 import NVFP4Tensor, from_compressed_tensors, from_modelopt

__all__ = ["COMPRESSED_TENSORS", "MODELOPT", "FP8Linear", "Format", "NVFP4Embedding", "NVFP4Experts", "NVFP4Linear"]

n3 = torch.ops.n3
Buffers = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype, shape


class Format(NamedTuple):
    """The names that a format gives a layer's tensors."""

    codes: str
    global_scale: str
    load: Callable[..., NVFP4Tensor]

    @property
    def names(self) -> tuple[str, str, str]:
        return self.codes, "weight_scale", self.global_scale


MODELOPT = Format("weight", "weight_scale_2", from_modelopt)
COMPRESSED_TENSORS = Format("weight_packed", "weight_global_scale", from_compressed_tensors)


class Packed(nn.Module):
    """A module whose buffers keep their dtypes when the model is cast: codes and scales are what they are."""

    def __init__(self, buffers: Buffers):
        super().__init__()
        for name, (dtype, shape) in buffers.items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype))
        self.name: str | None = None  # once it is loaded
        self.register_load_state_dict_post_hook(type(self)._reload)

    def _apply(self, fn, recurse=True):
        own = {id(buffer) for buffer in self._buffers.values()}

        def keep(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if id(t) in own and out.dtype != t.dtype else out

        return super()._apply(keep, recurse)

    def finish(self, name: str, repair: bool) -> None:
        """Called when all tensors are loaded, and when others are: checks them, prepares what `forward` reads. Raises
        `CheckpointError`, whose message names the tensor."""
        self.name = name
        self._finish(name, repair)

    def _finish(self, name: str, repair: bool) -> None:
        raise NotImplementedError

    def _reload(self, incompatible_keys: object) -> None:
        if self.name is not None:
            self.finish(self.name, False)


def _checked(fmt: Format, name: str, parts: tuple[Tensor, ...], repair: bool) -> NVFP4Tensor:
    try:
        return fmt.load(dict(zip((f"{name}.{leaf}" for leaf in fmt.names), parts, strict=True)), name, repair=repair)
    except ValueError as error:
        hint = "; quantization_config's repair=True does so" if "repair=True" in str(error) else ""
        raise CheckpointError(f"{error}{hint}") from None


# ---------------------------------------------------------------- linear layers


class NVFP4Linear(Packed):
    """``x @ W^T + bias`` with NVFP4 weights and unquantised activations, by ``n3::nvfp4_linear``.

    A layer that is made of several of the checkpoint's (gate and up, say) has a global scale for each, and as many
    products where they differ: rows of one keep their own exact weights. A static scale of the activations is kept for
    saving and not used.

    Args:
        rows: of each of the checkpoint's layers.
    """

    def __init__(self, linear: nn.Linear, fmt: Format, buffers: Buffers, rows: tuple[int, ...]):
        super().__init__(buffers)
        self.in_features, self.out_features, self.fmt = linear.in_features, linear.out_features, fmt
        self.parts = self.rows = rows  # of the checkpoint's layers, and of those with one global scale
        self.bias = linear.bias
        self.register_buffer("global_scale", None, persistent=False)  # float32 [len(rows)], to multiply with

    @property
    def q(self) -> Tensor:
        return getattr(self, self.fmt.codes)

    @property
    def block_scale(self) -> Tensor:
        return self.weight_scale

    def _finish(self, name: str, repair: bool) -> None:
        stored = getattr(self, self.fmt.global_scale).reshape(-1)
        pieces = zip(self.q.split(self.parts), self.weight_scale.split(self.parts), stored, strict=True)
        loaded = [_checked(self.fmt, name, piece, repair) for piece in pieces]
        if repair:
            scales = torch.cat([t.block_scale.view(torch.uint8) for t in loaded])
            self.weight_scale = scales.view(torch.float8_e4m3fn)
        self.rows, self.global_scale = self.parts, torch.stack([t.global_scale for t in loaded])
        if (self.global_scale == self.global_scale[0]).all():
            self.rows, self.global_scale = (self.out_features,), self.global_scale[:1].clone()

    def forward(self, x: Tensor) -> Tensor:
        if len(self.rows) == 1:
            return n3.nvfp4_linear(x, self.q, self.weight_scale, self.global_scale, self.bias)
        parts = [self.q, self.weight_scale, *([] if self.bias is None else [self.bias])]
        pieces = zip(*(part.split(self.rows) for part in parts), strict=True)
        return torch.cat([
            n3.nvfp4_linear(x, q, scale, self.global_scale[i], *bias) for i, (q, scale, *bias) in enumerate(pieces)
        ], dim=-1)  # fmt: skip

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class NVFP4Embedding(Packed):
    """Rows of an NVFP4 table, decoded when they are looked up, by ``n3::nvfp4_embedding``."""

    def __init__(self, embedding: nn.Embedding, fmt: Format, buffers: Buffers):
        super().__init__(buffers)
        self.num_embeddings, self.embedding_dim, self.fmt = embedding.num_embeddings, embedding.embedding_dim, fmt
        self.dtype = embedding.weight.dtype
        self.register_buffer("global_scale", None, persistent=False)

    def _finish(self, name: str, repair: bool) -> None:
        loaded = _checked(self.fmt, name, tuple(getattr(self, leaf) for leaf in self.fmt.names), repair)
        self.weight_scale, self.global_scale = loaded.block_scale, loaded.global_scale

    def forward(self, ids: Tensor) -> Tensor:
        q = getattr(self, self.fmt.codes)
        return n3.nvfp4_embedding(ids, q, self.weight_scale, self.global_scale, dtype=self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class FP8Linear(Packed):
    """``x @ W^T + bias`` with e4m3 weights of one scale.

    On GPUs with FP8 tensor cores a 16-bit ``x`` is rounded to e4m3 with the checkpoint's ``input_scale``, or with one
    of its own where there is none, and multiplied by torch's ``scaled_mm``. Elsewhere the weight is decoded, in float32
    and rounded once to the dtype of ``x``, and ``x`` stays as it is.
    """

    def __init__(self, linear: nn.Linear, buffers: Buffers):
        super().__init__(buffers)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        if "input_scale" not in buffers:
            self.input_scale = None

    def _finish(self, name: str, repair: bool) -> None:
        for leaf in ("weight_scale", "input_scale"):
            scale = getattr(self, leaf)
            if scale is not None and not (scale.isfinite() & (scale >= 0)).all():
                raise CheckpointError(f"{name}.{leaf} must be a finite number >= 0, got {scale.item()}")
        if (self.weight.view(torch.uint8) & 0x7F).eq(0x7F).any():
            raise CheckpointError(f"{name}.weight must have no NaN")

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32 and self.in_features % 16 == 0 == self.out_features % 16 and _has_fp8(x.device):
            return self._scaled_mm(x)
        weight = self.weight.float() * self.weight_scale.reshape(()).float()
        return F.linear(x, weight.to(x.dtype), self.bias)

    def _scaled_mm(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        most = torch.finfo(torch.float8_e4m3fn).max
        if self.input_scale is not None:
            scale = self.input_scale.reshape(()).float()
        else:
            scale = rows.abs().amax().float() / most if len(rows) else rows.new_ones((), dtype=torch.float32)
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # of zeros alone: their codes are 0 with any scale
        codes = (rows.float() / scale).clamp(-most, most).to(torch.float8_e4m3fn)
        y = F.scaled_mm(
            codes, self.weight.t(), scale, F.ScalingType.TensorWise, self.weight_scale.reshape(()).float(),
            F.ScalingType.TensorWise, bias=self.bias, output_dtype=x.dtype,
        )  # fmt: skip
        return y.unflatten(0, x.shape[:-1]) if x.dim() > 1 else y.squeeze(0)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@cache
def _has_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


# ---------------------------------------------------------------- experts


class NVFP4Experts(Packed):
    """The routed experts of a layer, stacked: ``n3::moe_experts`` on packed weights, one global scale per expert.

    In gated experts the gate's and the up projection's scale may differ. The result is linear in the up projection, so
    the quotient of the two goes into the down projection's scale: a float32 factor per expert instead of one for half
    of its rows.

    Args:
        sides: the names of the first and second projection; buffers are named after them, ``up_proj``,
            ``up_proj_scale``, ``up_proj_scale_2``.
    """

    def __init__(self, activation: str, fmt: Format, sides: tuple[str, str], buffers: Buffers):
        super().__init__(buffers)
        self.activation, self.fmt, self.sides = activation, fmt, sides
        self.num_experts = buffers[expert_buffer(sides[0], fmt.codes)][1][0]
        for name in ("up_global", "down_global"):
            self.register_buffer(name, None, persistent=False)

    def _parts(self, side: str) -> list[Tensor]:
        return [getattr(self, expert_buffer(side, leaf)) for leaf in self.fmt.names]

    def _finish(self, name: str, repair: bool) -> None:
        found = []
        for side in self.sides:
            q, scale, stored = self._parts(side)
            stored = stored.reshape(self.num_experts, -1)
            halves = zip(q.chunk(stored.shape[1], 1), scale.chunk(stored.shape[1], 1), stored.unbind(1), strict=True)
            loaded = [_checked(self.fmt, f"{name}.{side}", half, repair) for half in halves]
            if repair:
                scales = torch.cat([t.block_scale.view(torch.uint8) for t in loaded], 1)
                setattr(self, expert_buffer(side, "weight_scale"), scales.view(torch.float8_e4m3fn))
            found.append([t.global_scale.expand(self.num_experts) for t in loaded])
        (gate, *up), (down,) = found
        for scale in up:  # where the gate's is 0, the expert's output is 0 whatever comes after
            down = torch.where((gate == scale) | (gate == 0), down, down * (scale / gate))
        if not down.isfinite().all():
            raise CheckpointError(f"{name}: global scales of gate and up projection are too far apart")
        self.up_global, self.down_global = gate.contiguous(), down.contiguous()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        (up, up_scale, _), (down, down_scale, _) = (self._parts(side) for side in self.sides)
        return n3.moe_experts(
            hidden_states, up, down, top_k_index.int(), top_k_weights.float(), up_scale, self.up_global, down_scale,
            self.down_global, activation=self.activation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, activation={self.activation}"


def expert_buffer(side: str, leaf: str) -> str:
    """``up_proj, weight_scale -> up_proj_scale``: where stacked experts keep what a layer has under ``leaf``."""
    rest = leaf.removeprefix("weight").removeprefix("_")
    return f"{side}_{rest}" if rest else side
