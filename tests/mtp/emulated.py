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


def pointers(names):
    return [(name, c_void_p) for name in names.split()]


class RowInputs(ctypes.Structure):
    _fields_ = [
        ("logits", c_void_p), ("stride", c_int64), ("type", c_int32), ("vocab", c_int32), ("rows", c_int32),
        ("slots", c_int32),
        *pointers("slot seed temperature top_p min_p top_k bitmask bitmask_row forced_token bias_ids bias_cu bias_val"),
        ("mask_rows", c_int32), ("biases", c_int32),
    ]  # fmt: skip


class RowArgs(RowInputs):
    _fields_ = [
        ("width", c_int32), ("requests", c_int32), *pointers("cu_rows drafts law_tokens law_ids law_map"),
        ("entries", c_int32), ("mapped", c_int32), ("tiles", c_int32), ("subs", c_int32),
        *pointers("masses heats maxima gathered cuts flags"), ("apart", c_bool), ("certain_at_infinity", c_bool),
    ]  # fmt: skip


class SampleArgs(ctypes.Structure):
    _fields_ = pointers("pos tokens flags logprobs")


class DraftSampleArgs(ctypes.Structure):
    _fields_ = [*pointers("pos map tokens ids probs"), ("max_ids", c_int32)]


class LawInputs(ctypes.Structure):
    _fields_ = [*pointers("ids probs map"), ("entries", c_int32), ("mapped", c_int32)]


class WalkArgs(ctypes.Structure):
    _fields_ = [
        *pointers("cu_rows drafts eos pos uniforms"), ("laws", LawInputs), ("requests", c_int32), ("width", c_int32),
        ("eos_count", c_int32), *pointers("tokens num_emitted flags logprobs"),
    ]  # fmt: skip


class VerifyArgs(WalkArgs):
    _fields_ = [
        ("mode", c_int32), ("relaxed_top_k", c_int64), ("relaxed_delta", c_double), ("typical_epsilon", c_double),
        ("typical_delta", c_double), ("last_row", c_void_p),
    ]  # fmt: skip


class TreeArgs(WalkArgs):
    _fields_ = [("mode", c_int32), *pointers("parents path")]


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
            logits=logits.data_ptr(), stride=logits.stride(0), type=DTYPES.index(logits.dtype), vocab=logits.shape[1],
            rows=logits.shape[0], slots=seed.shape[0], seed=self(seed), width=width, bitmask=self(bitmask),
            bias_ids=self(bias_ids), mask_rows=0 if bitmask is None else len(bitmask),
            biases=0 if bias_ids is None else len(bias_ids), **columns,
        )  # fmt: skip

    def walk(self, kind, tokens, cu_rows, pos, eos_ids, uniforms, ids, probs, words, width, mode):
        """The arguments of a walk and its outputs, in the order tokens, counts, rows, log-probabilities, flags."""
        b = len(cu_rows) - 1
        rows = (b,) if kind is VerifyArgs else (b, width)
        out = room(b, width), room(b), room(*rows), room(b, width, dtype=torch.float32), room(b)
        laws = LawInputs(
            self(ids), self(probs), self(words), 0 if ids is None else ids.shape[1], 0 if words is None else len(words)
        )
        return kind(
            cu_rows=self(cu_rows), drafts=self(tokens), eos=self(eos_ids), pos=self(pos), uniforms=self(uniforms),
            laws=laws, requests=b, width=width, eos_count=0 if eos_ids is None else len(eos_ids),
            tokens=out[0].data_ptr(), num_emitted=out[1].data_ptr(), logprobs=out[3].data_ptr(),
            flags=out[4].data_ptr(), mode=MODES.index(mode),
        ), out  # fmt: skip


def room(*shape, dtype=torch.int32):
    return torch.full(shape, NOTHING if dtype == torch.int32 else float("nan"), dtype=dtype)


def sample(logits, seed, pos, **options):
    torch.ops.n3.sample.default(logits, seed, pos, **options)  # the checks are not the kernels'
    n, keep = logits.shape[0], Arguments()
    args = keep.rows(logits, seed, **options)
    out = room(n), room(n, dtype=torch.float32), room(n)
    outputs = SampleArgs(keep(pos), *(t.data_ptr() for t in (out[0], out[2], out[1])))
    kernels().emulate_sample(ctypes.byref(args), ctypes.byref(outputs), c_int64(n), c_bool(reversed_threads))
    return out


MODES = ("greedy", "coupled", "token", "block", "relaxed", "typical")


def verify(
    logits, draft_tokens, cu_rows, seed, pos, *, mode="greedy", max_drafts, eos_ids=None, draft_ids=None,
    draft_probs=None, draft_logits=None, draft_temperature=None, draft_vocab=None, allow_lossy=False, relaxed_top_k=1,
    relaxed_delta=0.0, typical_epsilon=0.3, typical_delta=0.09, uniforms=None, slot=None, **options,
):  # fmt: skip
    keep, laws = Arguments(), (draft_ids, draft_probs, draft_vocab)
    call, out = keep.walk(
        VerifyArgs, draft_tokens, cu_rows, pos, eos_ids, uniforms, *laws, width=max_drafts + 1, mode=mode
    )
    call.relaxed_top_k, call.relaxed_delta, call.last_row = relaxed_top_k, relaxed_delta, out[2].data_ptr()
    call.typical_epsilon, call.typical_delta = typical_epsilon, typical_delta
    requests = {"cu_rows": cu_rows, "drafts": draft_tokens, "slot": slot}
    args, drafts = keep.rows(logits, seed, call.width, **requests, **options), RowArgs()
    if mode not in ("greedy", "coupled"):
        args.law_tokens, args.law_ids, args.law_map = call.drafts, call.laws.ids, call.laws.map
        args.entries, args.mapped = call.laws.entries or 1, call.laws.mapped
        args.apart = mode in ("token", "block") and draft_logits is None
    if draft_logits is not None:
        drafts = keep.rows(draft_logits, seed, call.width, **requests, temperature=draft_temperature)
        drafts.certain_at_infinity = True
    kernels().emulate_verify(
        ctypes.byref(args), ctypes.byref(drafts), ctypes.byref(call), c_bool(reversed_threads)
    )  # fmt: skip
    return out


def draft_sample(logits, seed, pos, *, max_ids, draft_vocab=None, **options):
    n, keep = logits.shape[0], Arguments()
    args = keep.rows(logits, seed, **options)
    out = room(n), room(n, max_ids), room(n, max_ids, dtype=torch.float32)
    call = DraftSampleArgs(keep(pos), keep(draft_vocab), *(t.data_ptr() for t in out), max_ids)
    kernels().emulate_draft_sample(ctypes.byref(args), ctypes.byref(call), c_bool(reversed_threads))
    return out


def verify_tree(
    logits, node_tokens, parents, cu_rows, seed, pos, *, mode="greedy", max_depth, eos_ids=None, draft_ids=None,
    draft_probs=None, draft_vocab=None, uniforms=None, **options,
):  # fmt: skip
    keep, laws = Arguments(), (draft_ids, draft_probs, draft_vocab)
    call, out = keep.walk(TreeArgs, node_tokens, cu_rows, pos, eos_ids, uniforms, *laws, width=max_depth + 1, mode=mode)
    call.parents, call.path = keep(parents), out[2].data_ptr()
    args = keep.rows(logits, seed, 0, cu_rows=cu_rows, **options)
    args.requests = call.requests
    kernels().emulate_verify_tree(ctypes.byref(args), ctypes.byref(call), c_bool(reversed_threads))
    return out
