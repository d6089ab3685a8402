"""How far an operator's results are from its definition in float64, for the very arguments of a call."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import _dispatch

__all__ = ["Deviation", "Watch", "compare"]

# Arguments that are float32 by contract: stored scales, and parameters of the sampler.
_FLOAT32 = {"global_scale", "up_global", "down_global", "shared_up_global", "shared_down_global"}
_FLOAT32 |= {"temperature", "top_p", "min_p", "bias_val", "state_scale"}
# Operators whose definition is a sequence of single float32 roundings: compared as called, byte for byte.
_ROUNDED = {"nvfp4_quantize", "nvfp4_fake_quantize", "relu2_nvfp4_quantize", "silu_mul_nvfp4_quantize"}
_ROUNDED |= {"rms_norm_nvfp4_quantize"}
_WIDE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Deviation:
    """The largest distances over the calls of one operator."""

    calls: Counter = field(default_factory=Counter)  # backend -> calls
    error: float | None = None  # |out - truth|; None without a floating-point result
    relative: float = 0.0  # error over the largest |truth| of the same result
    integers: int = 0  # integer and e4m3 elements compared
    differ: int = 0  # of these, how many are not equal

    def add(self, out: Tensor, truth: Tensor) -> None:
        if out.shape != truth.shape:
            raise RuntimeError(f"a result has shape {list(out.shape)}, its definition {list(truth.shape)}")
        if out.dtype not in (*_WIDE, torch.float64):
            self.integers += out.numel()
            self.differ += int((_bytes(out) != _bytes(truth)).sum())
            return
        out, truth = out.double(), truth.double()
        same = (out == truth) | (out.isnan() & truth.isnan())
        distance = torch.where(same, 0.0, (out - truth).abs()).nan_to_num(math.inf, posinf=math.inf)
        worst = distance.max().item() if out.numel() else 0.0
        size = truth[truth.isfinite()].abs().max().item() if truth.isfinite().any() else 0.0
        self.error = max(self.error or 0.0, worst)
        self.relative = max(self.relative, worst / size if size else math.inf if worst else 0.0)


def _bytes(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t


def _tensors(results: Any) -> list[Tensor]:
    if results is None:  # of an operator that only writes
        return []
    return [results] if isinstance(results, Tensor) else list(results)


def compare(op: _dispatch.Op, args: tuple, kwargs: dict[str, Any], into: Deviation) -> Any:
    """Calls the operator, and its reference on copies in float64; returns what the call returned.

    Results and written arguments are compared. Floating-point arguments are widened where the contract is not float32.
    """
    bound, wide = op.signature.bind(*args, **kwargs), op.signature.bind(*args, **kwargs)
    for name, value in wide.arguments.items():
        wide.arguments[name] = _widened(op, name, value)
    into.calls[_dispatch.explain(op.name, *args, **kwargs).backend] += 1
    results = op.overload(*args, **kwargs)
    # A composite's definition calls operators, of which the reference alone takes float64.
    with _dispatch.use_backend("reference") if op.composite else contextlib.nullcontext():
        truths = op.reference(*wide.args, **wide.kwargs)
    for out, truth in zip(_tensors(results), _tensors(truths), strict=True):
        into.add(out, truth)
    for argument in op.overload._schema.arguments:
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and bound.arguments.get(argument.name) is not None:
            into.add(bound.arguments[argument.name], wide.arguments[argument.name])
    return results


def _widened(op: _dispatch.Op, name: str, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    widen = value.dtype in _WIDE and name not in _FLOAT32 and op.name not in _ROUNDED
    return value.double() if widen else value.clone()


class Watch(TorchDispatchMode):
    """In a ``with`` block, every call of an operator of n3 is compared with its definition.

    >>> from n3kernels.mamba import gated_rms_norm
    >>> with Watch() as watch:
    ...     _ = gated_rms_norm(torch.randn(2, 8), None, torch.ones(8), 4)
    >>> watch.seen["gated_rms_norm"].calls.total(), watch.seen["gated_rms_norm"].relative < 1e-5
    (1, True)
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Deviation] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "n3":
            return func(*args, **(kwargs or {}))
        overload = "" if func._overloadname == "default" else "." + func._overloadname
        op = _dispatch.OPS[func._schema.name.removeprefix("n3::") + overload]
        return compare(op, args, kwargs or {}, self.seen.setdefault(op.name, Deviation()))
