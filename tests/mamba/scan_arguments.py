"""The arguments of the sm_90 kernel of ssd_scan as tests/cuda_emulator/ssd_scan.cpp takes them: its launcher's part."""

from __future__ import annotations

import ctypes
import math

import torch
from conftest import fenced

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of the kernel's codes


class Operand(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int64), ("strides", ctypes.c_int64 * 4)]


SIZES = ["sequences", "packed", "length", "tokens", "heads", "groups", "head_dim", "d_state", "slots"]
SIZES += ["checkpoints", "sms"]
OPERANDS = ["x", "B", "C", "z", "dt", "A", "D", "dt_bias", "initial", "final", "state_indices", "cu_seqlens"]
OPERANDS += ["has_initial", "checkpoint_tokens", "checkpoint_indices"]


class Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, Operand) for name in OPERANDS),
        ("y", ctypes.c_void_p),
        ("dt_min", ctypes.c_double),
        ("dt_max", ctypes.c_double),
        *((name, ctypes.c_int64) for name in ("softplus", "lazy", "reversed")),
    ]


def operand(t, last=None):
    """`last`: dimensions behind sequence and token, of which a packed operand has no first."""
    if t is None:
        return Operand()
    code = DTYPES.index(t.dtype) if t.dtype in DTYPES else int(t.dtype == torch.int64)
    strides = list(t.stride())
    if last is not None and t.dim() == last + 1:
        strides = [0, *strides]
    return Operand(t.data_ptr(), code, (ctypes.c_int64 * 4)(*strides))


def scan(kernel, call, final, *, initial=None, indices=None, has_initial=None, ends=None, checkpoints=(None, None),
         softplus=True, dt_min=0.0, dt_max=None, sms=3, lazy=2, reverse=False, saturated=False):  # fmt: skip
    """y, written between fences; `final` is written in place. `saturated`: of float16 that does not become infinite."""
    x, B = call["x"], call["B"]
    packed = ends is not None
    sequences = len(ends) - 1 if packed else len(x)
    room = fenced(torch.full(x.shape, float("nan"), dtype=x.dtype))
    c = Call(
        sequences=sequences, packed=packed, length=0 if packed else x.shape[1], tokens=x.shape[:-2].numel(),
        heads=x.shape[-2], groups=B.shape[-2], head_dim=x.shape[-1], d_state=B.shape[-1], slots=len(final), sms=sms,
        checkpoints=0 if checkpoints[0] is None else len(checkpoints[0]), y=room.data_ptr(), dt_min=dt_min,
        dt_max=math.inf if dt_max is None else dt_max, softplus=softplus, lazy=lazy, reversed=reverse,
        x=operand(x, 2), B=operand(B, 2), C=operand(call["C"], 2), z=operand(call["z"], 2), dt=operand(call["dt"], 1),
        A=operand(call["A"]), D=operand(call["D"]), dt_bias=operand(call["dt_bias"]), initial=operand(initial),
        final=operand(final), state_indices=operand(indices), cu_seqlens=operand(ends),
        has_initial=operand(has_initial), checkpoint_tokens=operand(checkpoints[0]),
        checkpoint_indices=operand(checkpoints[1]),
    )  # fmt: skip
    if saturated:
        c.x.dtype = len(DTYPES)
    kernel(ctypes.byref(c))
    whole = room.as_strided((room.numel() + 128,), (1,), 0)
    assert whole[:64].isnan().all() and whole[-64:].isnan().all(), "written out of range"
    return room
