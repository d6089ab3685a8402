"""NVFP4 weights as checkpoints store them: both formats share codes and block scales, not the global scale."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .._checks import dtype_name, shape_str
from .tensor import NVFP4Tensor

__all__ = ["from_compressed_tensors", "from_modelopt"]


def from_modelopt(state_dict: Mapping[str, Tensor], prefix: str, *, repair: bool = False) -> NVFP4Tensor:
    r"""Returns the weight that NVIDIA ModelOpt stored under ``prefix``, ``global_scale = weight_scale_2``.

    Args:
        state_dict: has ``<prefix>.weight`` (uint8 ``[..., N, K/2]``), ``<prefix>.weight_scale`` (float8_e4m3fn
            ``[..., N, K/16]``) and ``<prefix>.weight_scale_2`` (float32: 1 element, or ``[E]`` for a stack).
        prefix: the layer's name, e.g. ``"backbone.layers.1.mixer.up_proj"``.
        repair: set NaN block scales of all-zero blocks, which old ModelOpt versions wrote, to 0.
    Returns:
        `NVFP4Tensor` with linear scales; shares memory with ``state_dict`` unless repaired.
    Raises:
        KeyError: a tensor is missing; the message names it and what is there.
        ValueError: a tensor has another dtype or shape, a block scale is NaN, or the global scale is not a finite
            number >= 0; the message names the tensor.
    Source: ModelOpt's ``hf_quant_config.json`` format ``NVFP4``; the NaN scales are Model-Optimizer#1397.

    >>> from n3kernels import nvfp4
    >>> w = nvfp4.quantize(torch.randn(4, 32))
    >>> layer = {"up.weight": w.q, "up.weight_scale": w.block_scale, "up.weight_scale_2": w.global_scale}
    >>> torch.equal(from_modelopt(layer, "up").dequantize(), w.dequantize())
    True
    """
    names = ("weight", "weight_scale", "weight_scale_2")
    return _load("from_modelopt", state_dict, prefix, names, inverse=False, repair=repair)


def from_compressed_tensors(state_dict: Mapping[str, Tensor], prefix: str, *, repair: bool = False) -> NVFP4Tensor:
    r"""Returns the weight that compressed-tensors stored under ``prefix``, ``global_scale = 1 / weight_global_scale``.

    Args:
        state_dict: has ``<prefix>.weight_packed`` (uint8 ``[..., N, K/2]``), ``<prefix>.weight_scale`` (float8_e4m3fn
            ``[..., N, K/16]``) and ``<prefix>.weight_global_scale`` (float32: 1 element, or ``[E]``), an encode scale.
        prefix: the layer's name, e.g. ``"model.layers.1.mlp.up_proj"``.
        repair: set NaN block scales of all-zero blocks to 0.
    Returns:
        `NVFP4Tensor` with linear scales and the decode scale; shares memory with ``state_dict`` unless repaired.
    Raises:
        KeyError, ValueError: as `from_modelopt`.
    Source: compressed-tensors' format ``nvfp4-pack-quantized``.

    >>> from n3kernels import nvfp4
    >>> w = nvfp4.quantize(torch.randn(4, 32), torch.tensor(0.25))
    >>> layer = {"up.weight_packed": w.q, "up.weight_scale": w.block_scale}
    >>> layer["up.weight_global_scale"] = torch.tensor([4.0])
    >>> torch.equal(from_compressed_tensors(layer, "up").dequantize(), w.dequantize())
    True
    """
    names = ("weight_packed", "weight_scale", "weight_global_scale")
    return _load("from_compressed_tensors", state_dict, prefix, names, inverse=True, repair=repair)


def _load(fn: str, state_dict: Mapping[str, Tensor], prefix: str, names: tuple[str, ...], inverse: bool, repair: bool):
    keys = [f"{prefix}.{name}" if prefix else name for name in names]
    for key in keys:
        if key not in state_dict:
            there = sorted(k for k in state_dict if k.startswith(f"{prefix}." if prefix else ""))
            found = ", ".join(there[:8]) or "nothing"
            raise KeyError(f"{fn}: state_dict must have {key}, got {found} under '{prefix}'")
    q, block_scale, global_scale = (state_dict[key] for key in keys)
    _check_parts(fn, keys, q, block_scale, global_scale)
    block_scale = _without_nan(fn, keys[1], q, block_scale, repair)
    if global_scale.numel() == 1:
        global_scale = global_scale.reshape(())
    t = NVFP4Tensor.from_parts(q, block_scale, global_scale, inverse=inverse)
    usable = global_scale.isfinite() & t.global_scale.isfinite() & (t.global_scale >= 0)
    if not usable.all():
        rule = "a finite number > 0" if inverse else "a finite number >= 0"
        raise ValueError(f"{fn}: {keys[2]} must be {rule}, got {global_scale.tolist()}")
    return t


def _check_parts(fn: str, keys: list[str], q: Tensor, block_scale: Tensor, global_scale: Tensor) -> None:
    wants = (torch.uint8, "packed e2m1 codes"), (torch.float8_e4m3fn, "block scales"), (torch.float32, "global scale")
    for key, t, (dtype, what) in zip(keys, (q, block_scale, global_scale), wants, strict=True):
        if t.dtype != dtype:
            got = f"{dtype_name(t.dtype)} {shape_str(t)}"
            raise ValueError(f"{fn}: {key} must be {dtype_name(dtype)} ({what}), got {got}")
    if q.dim() < 2 or q.shape[-1] % 8:
        raise ValueError(f"{fn}: {keys[0]} must have shape [..., N, K/2] with K a multiple of 16, got {shape_str(q)}")
    want = [*q.shape[:-1], q.shape[-1] // 8]
    if list(block_scale.shape) != want:
        raise ValueError(f"{fn}: {keys[1]} must have shape {want}, got {shape_str(block_scale)}")
    if global_scale.numel() != 1 and (q.dim() != 3 or global_scale.shape != q.shape[:1]):
        raise ValueError(f"{fn}: {keys[2]} must have 1 element, got shape {shape_str(global_scale)}")


def _without_nan(fn: str, key: str, q: Tensor, block_scale: Tensor, repair: bool) -> Tensor:
    scale_bytes = block_scale.view(torch.uint8)
    nan = (scale_bytes & 0x7F) == 0x7F
    if not nan.any():
        return block_scale
    zero_block = ((q & 0x77) == 0).unflatten(-1, (-1, 8)).all(-1)
    wrong = nan & ~zero_block if repair else nan
    if repair and not wrong.any():
        return torch.where(nan, 0, scale_bytes).view(torch.float8_e4m3fn)
    message = f"{fn}: {key} must have no NaN, got {int(wrong.sum())}, the first at {wrong.nonzero()[0].tolist()}"
    if not repair:
        message += f"; repair=True sets the {int((nan & zero_block).sum())} of them that scale all-zero blocks to 0"
    raise ValueError(message)
