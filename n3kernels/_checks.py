"""Argument checks and their words: ``n3::<op>: <argument> must <rule>, got <value>``.

The Python twin of csrc/common/check.h. It serves the reference, the Triton entries and the fake kernels; tests compare
the messages of the two word for word. Conditions are tested before a message is built, so that symbolic sizes under
``torch.compile`` become guards and nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

__all__ = ["FLOATING", "Check", "dtype_name", "shape_str"]

FLOATING = (torch.float32, torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_str(t: Tensor) -> str:
    return "[" + ", ".join(str(s) for s in t.shape) + "]"


class Check:
    """The checks of one operator: ``Check("moe_sort").dtype("ids", ids, torch.int32)``."""

    def __init__(self, op: str):
        self.op = op

    def fail(self, message: str) -> NoReturn:
        raise RuntimeError(f"n3::{self.op}: {message}")

    def that(self, condition: bool, rule: str, got: object = None) -> None:
        """``rule`` reads "x must ..."; ``got`` is a value, or a function of nothing for one that is dear to print."""
        if not condition:
            self.fail(rule if got is None else f"{rule}, got {got() if callable(got) else got}")

    def floating(self, name: str, t: Tensor, double: bool = True) -> None:
        """float32, float16 or bfloat16; float64 passes where the reference alone serves it, for gradient checks."""
        if t.dtype not in FLOATING and not (double and t.dtype == torch.float64):
            self.fail(f"{name} must be float32, float16 or bfloat16, got {dtype_name(t.dtype)}")

    def dtype(self, name: str, t: Tensor, *allowed: torch.dtype) -> None:
        if t.dtype not in allowed:
            want = [dtype_name(d) for d in allowed]
            text = want[0] if len(want) == 1 else ", ".join(want[:-1]) + " or " + want[-1]
            self.fail(f"{name} must be {text}, got {dtype_name(t.dtype)}")

    def dim(self, name: str, t: Tensor, *allowed: int) -> None:
        if t.dim() not in allowed:
            self.fail(f"{name} must have {' or '.join(map(str, allowed))} dimensions, got {t.dim()}")

    def shape(self, name: str, t: Tensor, want: Sequence[int]) -> None:
        if t.dim() != len(want) or any(a != b for a, b in zip(t.shape, want, strict=True)):
            self.fail(f"{name} must have shape [{', '.join(str(s) for s in want)}], got {shape_str(t)}")

    def same_dtype(self, name: str, t: Tensor, other: str, o: Tensor) -> None:
        if t.dtype != o.dtype:
            self.fail(f"{name} must have the dtype of {other} ({dtype_name(o.dtype)}), got {dtype_name(t.dtype)}")

    def same_device(self, other: str, o: Tensor, **tensors: Tensor | None) -> None:
        for name, t in tensors.items():
            if t is not None and t.device != o.device:
                self.fail(f"{name} must be on the device of {other} ({o.device}), got {t.device}")

    def offsets(self, offsets: Tensor, rows: int) -> None:
        """Values of the offsets of groups of rows, on the CPU alone: elsewhere the host must not wait for them."""
        if offsets.device.type != "cpu":
            return
        before = 0
        for end in offsets.tolist():
            self.that(0 <= end <= rows, f"offsets must be between 0 and {rows}", end)
            self.that(end >= before, f"offsets must not fall, got {end} after {before}")
            before = end

    def choice(self, name: str, value: object, allowed: Sequence[object]) -> None:
        if value not in allowed:
            self.fail(f"{name} must be one of {', '.join(map(str, allowed))}, got {value}")
