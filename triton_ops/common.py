"""What every Triton kernel enters and leaves through, and what every launcher shares.

The interpreter (``TRITON_INTERPRET=1``, how tests run these kernels without a GPU) keeps bfloat16 as raw 16-bit
integers: it truncates where hardware rounds, converts subnormals wrongly and computes noise. `widen`, `narrow` and
`dot` are right in both worlds. Float32 arithmetic needs no help, except that a launch whose bits matter says
``enable_fp_fusion=False``: the default differs between versions of Triton.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = [
    "INTERPRET", "Case", "architecture", "batch_invariant", "device_function", "dot", "guard", "narrow", "on_row_of",
    "widen",
]  # fmt: skip

INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


# ---------------------------------------------------------------- device side


def device_function(fn: Callable[..., Any]) -> Any:
    """``triton.jit`` for a function that kernels call.

    The interpreter runs plain Python inside a kernel just as well, and takes half a millisecond to enter a jitted
    function: a kernel with ten calls in a loop would spend its tests there. Plain, it does not turn Python numbers that
    are assigned to variables into tensors.
    """
    return fn if INTERPRET.value else triton.jit(fn)


@device_function
def widen(x):
    """x in float32, exactly. To be applied right after a load."""
    if INTERPRET and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@device_function
def narrow(x, dtype: tl.constexpr):
    """float32 -> dtype, to nearest even."""
    if INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        half = tl.where(x == x, rounded, (bits >> 16) | 0x40)  # a NaN must not be rounded up to infinity
        return half.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@device_function
def dot(a, b, acc):
    """acc + a @ b, summed in float32: on the tensor cores for 16-bit operands, by FMA for float32 ones.

    Not TF32, and not three TF32 products either: tensor cores truncate when they add, which over a few thousand terms
    costs a relative 1e-5.
    """
    if INTERPRET:
        return acc + tl.dot(widen(a), widen(b), input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


# ---------------------------------------------------------------- host side


def architecture(t: torch.Tensor) -> int:
    """10 * major + minor of the tensor's device, the key of configuration tables; 90 under the interpreter."""
    if not t.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(t.device)
    return 10 * major + minor


def on_row_of(table: Mapping[int, Any], arch: int) -> Any:
    """The entry for ``arch``, or for the nearest lower architecture that has one, or else for the lowest."""
    return table[max((a for a in table if a <= arch), default=min(table))]


def guard(t: torch.Tensor) -> AbstractContextManager:
    """Makes the tensor's device current for a launch; does nothing for a CPU tensor."""
    return torch.cuda.device_of(t)


def batch_invariant() -> bool:
    """Whether ``n3kernels.batch_invariant()`` holds. This package also works alone, where the environment decides."""
    dispatch = sys.modules.get("n3kernels._dispatch")
    if dispatch is not None:
        return dispatch._batch_invariant
    return os.environ.get("N3_BATCH_INVARIANT", "0") == "1"


@dataclass(frozen=True)
class Case:
    """One compilation of a kernel, as a launcher of its module would ask for it.

    Every module of kernels has a function ``compile_cases(arch)`` that yields one case for each kernel, dtype and row
    of its configuration table; tests/test_compile_only.py compiles them all for every architecture, without a GPU.

    A tuple, as of strides, has a tuple of types. ``"i32:16"`` is a multiple of 16, and 1 a stride of one: facts which
    Triton's launcher tells the compiler of every integer that may be specialised, and wide loads need. None is an
    absent operand.
    """

    name: str
    kernel: Any
    types: Mapping[str, Any]  # argument -> Triton's name of its type: "*bf16", "*u8", "i32", ("i32:16", 1)
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)  # num_warps, num_stages, enable_fp_fusion
    aligned: Sequence[str] = ()  # arguments that are multiples of 16; default: all pointers
    exact: bool = False  # promises bits: no approximate or fused float32 operation may be in its machine code
