"""The family's operators on rows of logits as their CUDA kernels compute them, run on the CPU by tests/cuda_emulator.

Functions with the signatures of ``n3kernels.mtp``, for tests: they fill the kernels' arguments in as the launchers do.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_double, c_int32, c_int64, c_void_p

import torch
from kernel_text import load

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NOTHING = torch.iinfo(torch.int32).min  # in an output: not written
reversed_threads = False  # tests switch it


class RowArgs(ctypes.Structure):
    _fields_ = [
        ("logits", c_void_p), ("stride", c_int64), ("vocab", c_int32), ("rows", c_int32), ("slots", c_int32),
        ("width", c_int32), ("requests", c_int32),
        *((name, c_void_p) for name in (
            "cu_rows", "drafts", "slot", "temperature", "top_p", "min_p", "top_k", "bitmask", "bitmask_row",
            "forced_token", "bias_ids", "bias_cu", "bias_val",
        )),
        ("mask_rows", c_int32), ("biases", c_int32), ("law_tokens", c_void_p), ("law_ids", c_void_p),
        ("law_map", c_void_p), ("entries", c_int32), ("mapped", c_int32), ("tiles", c_int32), ("subs", c_int32),
        *((name, c_void_p) for name in ("masses", "heats", "maxima", "gathered", "cuts", "flags")),
        ("apart", c_bool), ("certain_at_infinity", c_bool),
    ]  # fmt: skip


class SampleArgs(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("seed", "pos", "tokens", "flags", "logprobs")]


class VerifyArgs(ctypes.Structure):
    _fields_ = [
        ("mode", c_int32), ("dense_type", c_int32),
        *((name, c_void_p) for name in ("seed", "pos", "uniforms", "drafts", "eos")), ("eos_count", c_int32),
        ("law_probs", c_void_p), ("relaxed_top_k", c_int64), ("relaxed_delta", c_double),
        ("typical_epsilon", c_double), ("typical_delta", c_double),
        *((name, c_void_p) for name in ("tokens", "num_emitted", "last_row", "flags", "logprobs")),
    ]  # fmt: skip


class DraftSampleArgs(ctypes.Structure):
    _fields_ = [*((name, c_void_p) for name in ("seed", "pos", "map", "tokens", "ids", "probs")), ("max_ids", c_int32)]


class TreeArgs(ctypes.Structure):
    _fields_ = [
        ("mode", c_int32), ("max_depth", c_int32),
        *((name, c_void_p) for name in ("seed", "pos", "uniforms", "nodes", "parents", "eos")), ("eos_count", c_int32),
        *((name, c_void_p) for name in ("law_ids", "law_map", "law_probs")), ("entries", c_int32), ("mapped", c_int32),
        *((name, c_void_p) for name in ("tokens", "num_emitted", "path", "flags", "logprobs")),
    ]  # fmt: skip


def kernels():
    loaded = load("mtp.cpp")
    loaded.size_of_arguments.restype = loaded.bytes_of_a_unit.restype = c_int64
    return loaded


class Arguments:
    """Contiguous copies of a call's tensors, which must outlive it, as pointers."""

    def __init__(self):
        self.kept = []

    def __call__(self, t):
        if t is None:
            return None
        self.kept.append(t.contiguous())
        return self.kept[-1].data_ptr()

    def rows(self, logits, seed, width=1, bitmask=None, bias_ids=None, **tensors) -> RowArgs:
        self.kept.append(logits)
        columns = {name: self(t) for name, t in tensors.items()}
        return RowArgs(
            logits=logits.data_ptr(), stride=logits.stride(0), vocab=logits.shape[1], rows=logits.shape[0],
            slots=seed.shape[0], width=width, bitmask=self(bitmask), bias_ids=self(bias_ids),
            mask_rows=0 if bitmask is None else len(bitmask), biases=0 if bias_ids is None else len(bias_ids),
            **columns,
        )  # fmt: skip


def room(*shape, dtype=torch.int32):
    return torch.full(shape, NOTHING if dtype == torch.int32 else float("nan"), dtype=dtype)


def sample(logits, seed, pos, **options):
    torch.ops.n3.sample.default(logits, seed, pos, **options)  # the checks are not the kernels'
    n, keep = logits.shape[0], Arguments()
    args = keep.rows(logits, seed, **options)
    out = room(n), room(n, dtype=torch.float32), room(n)
    outputs = SampleArgs(keep(seed), keep(pos), *(t.data_ptr() for t in (out[0], out[2], out[1])))
    kind = DTYPES.index(logits.dtype)
    kernels().emulate_sample(
        ctypes.byref(args), ctypes.byref(outputs), kind, c_int64(n), c_bool(reversed_threads)
    )  # fmt: skip
    return out


MODES = ("greedy", "coupled", "token", "block", "relaxed", "typical")


def verify(
    logits, draft_tokens, cu_rows, seed, pos, *, mode="greedy", max_drafts, eos_ids=None, draft_ids=None,
    draft_probs=None, draft_logits=None, draft_temperature=None, draft_vocab=None, allow_lossy=False, relaxed_top_k=1,
    relaxed_delta=0.0, typical_epsilon=0.3, typical_delta=0.09, uniforms=None, slot=None, **options,
):  # fmt: skip
    b, width, keep = cu_rows.shape[0] - 1, max_drafts + 1, Arguments()
    requests = {"cu_rows": cu_rows, "drafts": draft_tokens, "slot": slot}
    args = keep.rows(logits, seed, width, **requests, **options)
    if mode not in ("greedy", "coupled"):
        args.law_tokens, args.law_ids = keep(draft_tokens), keep(draft_ids)
        args.entries = 1 if draft_ids is None else draft_ids.shape[1]
        args.law_map, args.mapped = keep(draft_vocab), 0 if draft_vocab is None else len(draft_vocab)
        args.apart = mode in ("token", "block") and draft_logits is None
    drafts = RowArgs()
    if draft_logits is not None:
        drafts = keep.rows(draft_logits, seed, width, **requests, temperature=draft_temperature)
        drafts.certain_at_infinity = True
    out = room(b, width), room(b), room(b), room(b, width, dtype=torch.float32), room(b)
    call = VerifyArgs(
        MODES.index(mode), 0, keep(seed), keep(pos), keep(uniforms), keep(draft_tokens), keep(eos_ids),
        0 if eos_ids is None else len(eos_ids), keep(draft_probs), relaxed_top_k, relaxed_delta, typical_epsilon,
        typical_delta, *(out[i].data_ptr() for i in (0, 1, 2, 4, 3)),
    )  # fmt: skip
    kind = 0 if draft_logits is None else DTYPES.index(draft_logits.dtype)
    kernels().emulate_verify(
        ctypes.byref(args), ctypes.byref(drafts), ctypes.byref(call), DTYPES.index(logits.dtype), kind, c_int64(b),
        c_bool(reversed_threads),
    )  # fmt: skip
    return out


def draft_sample(logits, seed, pos, *, max_ids, draft_vocab=None, **options):
    n, keep = logits.shape[0], Arguments()
    args = keep.rows(logits, seed, **options)
    out = room(n), room(n, max_ids), room(n, max_ids, dtype=torch.float32)
    call = DraftSampleArgs(keep(seed), keep(pos), keep(draft_vocab), *(t.data_ptr() for t in out), max_ids)
    kernels().emulate_draft_sample(
        ctypes.byref(args), ctypes.byref(call), DTYPES.index(logits.dtype), c_int64(n), c_bool(reversed_threads)
    )  # fmt: skip
    return out


def verify_tree(
    logits, node_tokens, parents, cu_rows, seed, pos, *, mode="greedy", max_depth, eos_ids=None, draft_ids=None,
    draft_probs=None, draft_vocab=None, uniforms=None, **options,
):  # fmt: skip
    b, width, keep = cu_rows.shape[0] - 1, max_depth + 1, Arguments()
    args = keep.rows(logits, seed, 0, cu_rows=cu_rows, **options)
    args.requests = b
    out = room(b, width), room(b), room(b, width), room(b, width, dtype=torch.float32), room(b)
    call = TreeArgs(
        MODES.index(mode), max_depth, keep(seed), keep(pos), keep(uniforms), keep(node_tokens), keep(parents),
        keep(eos_ids), 0 if eos_ids is None else len(eos_ids), keep(draft_ids), keep(draft_vocab), keep(draft_probs),
        0 if draft_ids is None else draft_ids.shape[1], 0 if draft_vocab is None else len(draft_vocab),
        *(out[i].data_ptr() for i in (0, 1, 2, 4, 3)),
    )  # fmt: skip
    kernels().emulate_verify_tree(
        ctypes.byref(args), ctypes.byref(call), DTYPES.index(logits.dtype), c_bool(reversed_threads)
    )  # fmt: skip
    return out
