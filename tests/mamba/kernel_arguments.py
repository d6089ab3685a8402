"""The arguments of the mamba CUDA kernels as tests/cuda_emulator/mamba.cpp takes them, filled in as by the launchers.

Running the kernels' text on the CPU proves nothing about a GPU, where the same operators are tested through the
dispatcher; it finds on any machine what would otherwise be found on a GPU: indices, masks, strides, barriers, slots.
"""

from __future__ import annotations

import ctypes

import torch
from conftest import fenced
from kernel_text import load

TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.bool]  # mamba::Type
SOURCE, LAST, EACH = range(3)  # mamba::Where


class View(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int32), ("strides", ctypes.c_int64 * 4)]


class IndexView(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("wide", ctypes.c_bool), ("strides", ctypes.c_int64 * 2)]


class Slots(ctypes.Structure):
    _fields_ = [
        ("source", IndexView), ("columns", ctypes.c_int64), ("where", ctypes.c_int32), ("destination", IndexView),
        ("num_accepted", IndexView), ("num_tokens", IndexView), ("parents", IndexView), ("slots", ctypes.c_int64),
        ("batch", ctypes.c_int64), ("tokens", ctypes.c_int64),
    ]  # fmt: skip


class Source(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 4), ("sizes", ctypes.c_int64 * 3),
        ("bytes", ctypes.c_int32), ("copies", ctypes.c_void_p),
    ]  # fmt: skip


class Sources(ctypes.Structure):
    _fields_ = [("of", Source * 3), ("count", ctypes.c_int32)]


class Staged(ctypes.Structure):
    _fields_ = [("copied", ctypes.c_void_p), ("copies", ctypes.c_void_p)]


class Taps(ctypes.Structure):
    _fields_ = [
        ("weight", View), ("bias", View), ("channels", ctypes.c_int64), ("width", ctypes.c_int64),
        ("silu", ctypes.c_bool),
    ]  # fmt: skip


class NormArgs(ctypes.Structure):
    _fields_ = [
        ("x", View), ("z", View), ("weight", View), ("y", ctypes.c_void_p), ("rows", ctypes.c_int64),
        ("groups", ctypes.c_int64), ("group_size", ctypes.c_int64), ("eps", ctypes.c_float),
        ("norm_before_gate", ctypes.c_bool),
    ]  # fmt: skip


class ConvArgs(ctypes.Structure):
    _fields_ = [
        ("x", View), ("taps", Taps), ("initial", View), ("final", View), ("state_indices", IndexView),
        ("has_initial", View), ("cu_seqlens", IndexView), ("checkpoint_tokens", IndexView),
        ("checkpoint_indices", IndexView), ("y", ctypes.c_void_p), ("sequences", ctypes.c_int64),
        ("tokens", ctypes.c_int64), ("length", ctypes.c_int64), ("kept", ctypes.c_int64), ("slots", ctypes.c_int64),
        ("checkpoints", ctypes.c_int64), ("tiles", ctypes.c_uint32), ("channel_blocks", ctypes.c_uint32),
    ]  # fmt: skip


class FinishArgs(ctypes.Structure):
    _fields_ = [
        ("norm", NormArgs), ("z_sequence", ctypes.c_int64), ("z_token", ctypes.c_int64), ("conv", ConvArgs),
        ("norm_blocks", ctypes.c_uint32),
    ]  # fmt: skip


class PrefillSizes(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("tokens", "sequences", "inner", "channels", "kept", "group_size")
    ]


class SumArgs(ctypes.Structure):
    _fields_ = [
        ("partial", ctypes.c_void_p), ("pieces", ctypes.c_int64), ("rows", ctypes.c_int64), ("width", ctypes.c_int64),
        ("channels", ctypes.c_int64), ("weight", View), ("bias", View),
    ]  # fmt: skip


class NormBackwardArgs(ctypes.Structure):
    _fields_ = [
        ("forward", NormArgs), ("grad_y", View), ("dx", ctypes.c_void_p), ("dz", ctypes.c_void_p),
        ("partial", ctypes.c_void_p), ("rows_each", ctypes.c_int64), ("held", ctypes.c_bool),
    ]  # fmt: skip


class ConvBackwardArgs(ctypes.Structure):
    _fields_ = [
        ("forward", ConvArgs), ("grad_y", View), ("grad_final", View), ("dx", ctypes.c_void_p),
        ("d_initial", ctypes.c_void_p), ("partial", ctypes.c_void_p), ("tokens_each", ctypes.c_int64),
    ]  # fmt: skip


class ConvUpdateArgs(ctypes.Structure):
    _fields_ = [
        ("x", View), ("taps", Taps), ("state", View), ("use", ctypes.c_int32), ("slots", Slots),
        ("cache_seqlens", IndexView), ("states", Staged), ("y", View), ("kept", ctypes.c_int64),
        ("channel_blocks", ctypes.c_int64),
    ]  # fmt: skip


class TimeStep(ctypes.Structure):
    _fields_ = [
        ("dt", View), ("A", View), ("bias", View), ("softplus", ctypes.c_bool), ("low", ctypes.c_float),
        ("high", ctypes.c_float),
    ]  # fmt: skip


class SsmArgs(ctypes.Structure):
    _fields_ = [
        ("state", View), ("scale", View), ("x", View), ("z", View), ("B", View), ("C", View), ("D", View), ("y", View),
        ("time", TimeStep), ("slots", Slots), ("states", Staged), ("scales", Staged), ("seed", ctypes.c_void_p),
        ("seed_stride", ctypes.c_int64), ("heads", ctypes.c_int64), ("heads_per_group", ctypes.c_int64),
        ("head_dim", ctypes.c_int64), ("d_state", ctypes.c_int64), ("tiles", ctypes.c_int64),
        ("vectors", ctypes.c_bool),
    ]  # fmt: skip


class MixerNorm(ctypes.Structure):
    _fields_ = [
        ("z", View), ("y", View), ("weight", View), ("group_size", ctypes.c_int64), ("eps", ctypes.c_float),
        ("norm_before_gate", ctypes.c_bool),
    ]  # fmt: skip


class DecodeArgs(ctypes.Structure):
    _fields_ = [("conv", ConvUpdateArgs), ("ssm", SsmArgs), ("norm", MixerNorm), ("groups", ctypes.c_int64)]


class Ring(ctypes.Structure):
    _fields_ = [("x", View), ("B", View), ("dt", View), ("pos", View), ("size", ctypes.c_int64)]


class ReplayArgs(ctypes.Structure):
    _fields_ = [("ssm", SsmArgs), ("ring", Ring), ("flush", ctypes.c_bool)]


class MoveArgs(ctypes.Structure):
    _fields_ = [
        ("ring", Ring), ("source", IndexView), ("num_accepted", IndexView), ("path", IndexView),
        ("batch", ctypes.c_int64), ("slots", ctypes.c_int64), ("tokens", ctypes.c_int64), ("heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64), ("groups", ctypes.c_int64), ("d_state", ctypes.c_int64),
        ("blocks", ctypes.c_int64),
    ]  # fmt: skip


STRUCTURES = [NormArgs, ConvArgs, Slots, Sources, ConvUpdateArgs, SsmArgs, DecodeArgs, ReplayArgs, MoveArgs]
STRUCTURES += [FinishArgs, PrefillSizes]


BACKWARD = [NormBackwardArgs, ConvBackwardArgs, SumArgs]


def load_kernels(source="mamba.cpp", structures=STRUCTURES):
    """A library of kernels, whose structures have the layout of ours."""
    kernels = load(source)
    kernels.size_of_arguments.restype = ctypes.c_int64
    for i, structure in enumerate(structures):
        assert ctypes.sizeof(structure) == kernels.size_of_arguments(i), structure.__name__
    return kernels


def view(t, before=0):
    """Of a tensor whose strides are given from number `before` on; None: not given."""
    if t is None:
        return View()
    return View(t.data_ptr(), TYPES.index(t.dtype), (ctypes.c_int64 * 4)(*[0] * before, *t.stride()))


def indices(t):
    if t is None:
        return IndexView()
    return IndexView(t.data_ptr(), t.dtype == torch.int64, (ctypes.c_int64 * 2)(*t.stride()))


def slots(state, batch, tokens, source, destination, num_accepted=None, num_tokens=None, parents=None):
    where = SOURCE if destination is None else (LAST, EACH)[destination.dim() - 1]
    columns = source.shape[1] if source is not None and source.dim() == 2 else 0
    counts = (indices(t) for t in (num_accepted, num_tokens, parents))
    return Slots(indices(source), columns, where, indices(destination), *counts, len(state), batch, tokens)


def stage(kernels, where, states):
    """The copies that the launchers make where there are destinations; keeps their memory on the kernels."""
    if where.where == SOURCE or where.batch <= 1:
        return [Staged() for _ in states]
    sources, copied = Sources(count=len(states)), torch.full((where.batch,), 77, dtype=torch.uint8)
    kernels.kept = [copied]
    for i, s in enumerate(states):
        sizes, bytes_ = (list(s.shape[1:]) + [1, 1])[:3], s.element_size()
        strides = (list(s.stride()) + [0, 0])[:4]
        whole = s[0].numel()
        if s.is_contiguous() and whole * bytes_ % 16 == 0 and s.data_ptr() % 16 == 0:
            sizes, strides, bytes_ = [1, 1, whole * bytes_ // 16], [whole * bytes_ // 16, 0, 0, 1], 16
        copies = torch.full((where.batch * whole * s.element_size(),), 0x7F, dtype=torch.uint8)
        kernels.kept.append(copies)
        sources.of[i] = Source(
            s.data_ptr(), (ctypes.c_int64 * 4)(*strides), (ctypes.c_int64 * 3)(*sizes), bytes_, copies.data_ptr()
        )
    kernels.emulate_stage(ctypes.byref(where), ctypes.byref(sources), 2, ctypes.c_void_p(copied.data_ptr()))
    assert copied.max() <= 1
    return [Staged(copied.data_ptr(), copies.data_ptr()) for copies in kernels.kept[1:]]


def room(shape, dtype):
    """Uninitialised memory between fences: NaN wherever nothing was written."""
    return fenced(torch.full(shape, float("nan"), dtype=dtype))


def doubles(*tensors):
    return (None if t is None else t.double() for t in tensors)


def run(function, args, *more):
    function(ctypes.byref(args), *more)


def pointer(t):
    return ctypes.c_void_p(t.data_ptr())
