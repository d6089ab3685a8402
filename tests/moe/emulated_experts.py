"""Problems for the text of the sm_90 kernel of moe_experts, run on the CPU by tests/cuda_emulator."""

from __future__ import annotations

import ctypes

import moe_problems
import torch
from conftest import assert_close_to, fenced

from n3kernels.moe import reference
from n3kernels.nvfp4 import NVFP4Tensor

SOURCE = "moe_experts.cpp"
FORMS = ("dense", "nvfp4")


class Weights(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("data", "scales", "global_scale")),
        *((name, ctypes.c_int64 * 2) for name in ("strides", "scale_strides")),
    ]

    @staticmethod
    def of(w):
        outer = ctypes.c_int64 * 2
        if isinstance(w, torch.Tensor):
            return Weights(w.data_ptr(), None, None, outer(*w.stride()[:2]))
        parts = w.q, w.block_scale, w.global_scale
        return Weights(*(t.data_ptr() for t in parts), *(outer(*t.stride()[:2]) for t in parts[:2]))


class Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tokens", "top_k", "experts", "width", "inner", "first_expert", "sms")),
        ("x", ctypes.c_void_p),
        ("up", Weights),
        ("down", Weights),
        *((name, ctypes.c_void_p) for name in ("ids", "valid_tokens", "weights", "rows", "counters", "y")),
        *((name, ctypes.c_int64) for name in ("activation", "float_y", "first_token", "merged")),
        *((name, ctypes.c_int64) for name in ("lazy", "reversed", "side_by_side", "order")),
    ]


def call_of(problem, *, first_expert=0, valid_tokens=None, first_token=0, sms=3, lazy=2, reverse=False, merged=False,
            activation="relu2", out_dtype=None, side_by_side=1, order=0, counters=None):  # fmt: skip
    """The arguments, and y between fences; rows, and what else they point to, stay alive in its list ``keep``."""
    x, w_up, w_down, ids, weights = problem
    (tokens, k), (experts, width, inner) = ids.shape, w_down.shape
    # Rows of slots that nobody computes stay NaN.
    rows = torch.full((tokens * k * 10 * width + 1,), float("nan"))
    if counters is None:
        counters = torch.zeros(tokens + tokens * k + 1, dtype=torch.int32)
    limit = torch.tensor([tokens if valid_tokens is None else valid_tokens], dtype=torch.int32)
    y = fenced(torch.full(x.shape, float("nan"), dtype=out_dtype or x.dtype))
    call = Call(
        tokens=tokens, top_k=k, experts=experts, width=width, inner=inner, first_expert=first_expert, sms=sms,
        x=x.data_ptr(), up=Weights.of(w_up), down=Weights.of(w_down), ids=ids.data_ptr(), weights=weights.data_ptr(),
        valid_tokens=None if valid_tokens is None else limit.data_ptr(), rows=rows.data_ptr(), y=y.data_ptr(),
        counters=counters.data_ptr(), activation=moe_problems.ACTIVATIONS.index(activation),
        float_y=out_dtype is torch.float32, first_token=first_token, merged=merged, lazy=lazy, reversed=reverse,
        side_by_side=side_by_side, order=order,
    )  # fmt: skip
    call.keep = [rows, counters, limit, y, *problem]
    return call, y


def run(kernel, problem, **options):
    """y, written between fences, by a launch that leaves its counters as it found them: zero."""
    call, y = call_of(problem, **options)
    kernel.emulate_moe_experts.restype = ctypes.c_int64
    written = kernel.emulate_moe_experts(ctypes.byref(call)) * call.width
    rows, counters = call.keep[:2]
    assert rows[written:].isnan().all(), "rows written out of range"
    assert not counters.any(), "counters are not zero again"
    whole = y.as_strided((y.numel() + 128,), (1,), 0)
    assert whole[:64].isnan().all() and whole[-64:].isnan().all(), "written out of range"
    return y


def dense(experts, n, k, pad=1):
    """The rows end in NaN."""
    w = torch.full((experts, n, k + 8 * pad), float("nan")).bfloat16()
    w[:, :, :k] = torch.randn(experts, n, k) * k**-0.5
    return fenced(w)[:, :, :k]


def nvfp4(experts, n, k, pad=0, shift=0):
    """Any codes under any finite scales of either sign; behind the rows codes of 6 and scales of NaN, and the scales
    begin `shift` bytes behind an aligned address."""
    w = moe_problems.nvfp4(experts, n, k)
    block_scale = w.block_scale.view(torch.uint8) | torch.randint(0, 2, w.block_scale.shape, dtype=torch.uint8) * 128
    codes = torch.full((experts, n, k // 2 + 8 * pad), 0x77, dtype=torch.uint8)
    scales = torch.full((128 + shift + experts * n * (k // 16 + pad),), 0x7F, dtype=torch.uint8)
    scales = scales[64 + shift : len(scales) - 64].view(experts, n, k // 16 + pad)
    codes[:, :, : k // 2], scales[:, :, : k // 16] = w.q, block_scale
    codes = fenced(codes)[:, :, : k // 2]
    return NVFP4Tensor.from_parts(codes, scales[:, :, : k // 16].view(torch.float8_e4m3fn), fenced(w.global_scale))


def problem(form, tokens, k, experts, width, inner, *, first=0, activation="relu2", pad=0, shift=0):
    """Every tensor between NaN. Sizes are in whole blocks for NVFP4; ids reach past the experts on both sides."""
    if form == "nvfp4":
        width, inner = (-(-size // 16) * 16 for size in (width, inner))
    x = fenced(torch.randn(tokens, width).bfloat16())
    rows = inner if activation == "relu2" else 2 * inner
    sizes = (experts, rows, width), (experts, width, inner)
    w_up, w_down = (nvfp4(*s, pad, shift) if form == "nvfp4" else dense(*s) for s in sizes)
    ids = torch.randint(max(first - 1, -1), first + experts + 1, (tokens, k), dtype=torch.int32)
    return x, w_up, w_down, fenced(ids), fenced(torch.randn(tokens, k))


def assert_right(y, problem, first_expert=0, valid_tokens=None, activation="relu2"):
    x, w_up, w_down, ids, weights = problem
    used = reference.valid_ids(ids, None if valid_tokens is None else torch.tensor(valid_tokens))
    truth, magnitude = moe_problems.definition(x, w_up, w_down, used, weights, activation, first_expert)
    # Activations are rounded to bfloat16, whatever y is.
    assert_close_to(y, truth, acc=1.0, scale=2.0**-8 * magnitude + 1e-5 * (magnitude + 1))
