"""moe_route: the top_k experts of every token, their weights and the experts' counts; and moe_route_bwd.

A program, on a GPU one warp, holds a token's scores in registers. A choice becomes an int32 of the same order, so that
a round of the selection is three integer reductions, which a warp does in one instruction each: the largest key, the
lowest expert that has it, and that expert's score. Scores are float64 rounded once, as everywhere, hence equal ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import INTERPRET, Case, device_function, guard, narrow, widen

__all__ = ["compile_cases", "moe_route", "moe_route_bwd"]

GONE = tl.constexpr(-(2**31))  # the key of an expert that does not take part any more, below that of -inf
FLT_MAX = tl.constexpr(3.4028234663852886e38)
INF = tl.constexpr(float("inf"))
LANES = 1024  # of a row that one warp holds; longer ones, which only groups have, are dealt out twice as thin
TOKENS = 8 if INTERPRET else 1  # per program: a warp has one, and NumPy is as quick with eight


# ---------------------------------------------------------------- device side


@device_function
def _scores(x, valid, SOFTMAX: tl.constexpr):
    """The scores of rows ``[T, E]`` of logits, in float32; NaN stays, and with softmax takes its row along."""
    wide = x.to(tl.float64)
    if SOFTMAX:
        top = tl.max(tl.where(valid & (x == x), x, -INF), axis=1)
        e = tl.exp(wide - top.to(tl.float64)[:, None])
        return (e / tl.sum(tl.where(valid, e, 0.0), axis=1)[:, None]).to(tl.float32)
    else:
        return (1.0 / (1.0 + tl.exp(-wide))).to(tl.float32)


@device_function
def _key(v):
    """float32 -> int32 of the same order, above GONE. NaN counts as -inf; -0 is no score plus anything."""
    bits = tl.where(v == v, v, -INF).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@device_function
def _value(key):
    """The float32 of a key; of GONE a NaN."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@device_function
def _first(key, best, index, axis: tl.constexpr):
    """The lowest index whose key is ``best``, the largest along the axis."""
    return tl.min(tl.where(key == tl.expand_dims(best, axis), index, 0x7FFFFFFF), axis=axis)


@device_function
def _keep_groups(key, n_group, topk_group, PAIRS: tl.constexpr, BLOCK_G: tl.constexpr):
    """``key [T, BLOCK_G * S]``, GONE outside the topk_group groups with the largest sum of their two best values.

    PAIRS: a group has two experts or more, otherwise its one value decides.
    """
    T: tl.constexpr = key.shape[0]
    S: tl.constexpr = key.shape[1] // BLOCK_G
    by_group = tl.reshape(key, (T, BLOCK_G, S))
    best = tl.max(by_group, axis=2)
    sums = _value(best)
    if PAIRS:
        within = tl.arange(0, S)[None, None, :]
        rest = tl.where(within == _first(by_group, best, within, 2)[:, :, None], GONE, by_group)
        sums += _value(tl.max(rest, axis=2))
    group = tl.arange(0, BLOCK_G)[None, :]
    left = tl.where(group < n_group, _key(sums), GONE)
    kept = tl.full((T, BLOCK_G), 0, tl.int32)
    for _ in range(topk_group):
        first = _first(left, tl.max(left, axis=1), group, 1)
        kept = tl.where(group == first[:, None], 1, kept)
        left = tl.where(group == first[:, None], GONE, left)
    return tl.reshape(tl.where(kept[:, :, None] != 0, by_group, GONE), (T, BLOCK_G * S))


@triton.jit(do_not_specialize=["tokens", "n_group", "topk_group", "top_k", "scale"])
def _route_kernel(
    logits_ptr, logits_strides, bias_ptr, bias_strides, map_ptr, map_strides,
    ids_ptr, weights_ptr, counts_ptr, flags_ptr,
    tokens, n_group,
    group_size,  # experts of a group
    topk_group, top_k, scale,
    SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr,
    LIMITED: tl.constexpr,  # some groups do not take part
    PAIRS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_T tokens. A row has a lane for every expert; each group begins at a multiple of BLOCK_S."""
    lane = tl.arange(0, BLOCK_G * BLOCK_S)
    expert = lane
    valid = lane < group_size
    if BLOCK_G > 1:
        expert = lane // BLOCK_S * group_size + lane % BLOCK_S
        valid = (lane % BLOCK_S < group_size) & (lane // BLOCK_S < n_group)
        expert = tl.where(valid, expert, -1)  # is nobody's
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # int64: tokens * stride passes 2^31
    rows = t < tokens
    at = t[:, None] * logits_strides[0] + expert.to(tl.int64)[None, :] * logits_strides[1]
    x = widen(tl.load(logits_ptr + at, mask=rows[:, None] & valid[None, :], other=0.0))
    tl.store(flags_ptr + t, tl.max((tl.abs(x) <= FLT_MAX).to(tl.int32) ^ 1, axis=1), mask=rows)

    score = _scores(x, valid[None, :], SOFTMAX)
    choice = score
    if bias_ptr is not None:
        choice += tl.load(bias_ptr + expert.to(tl.int64) * bias_strides[0], mask=valid, other=0.0)[None, :]
    key = tl.where(valid[None, :], _key(choice), GONE)
    if LIMITED:
        key = _keep_groups(key, n_group, topk_group, PAIRS, BLOCK_G)

    bits = tl.where(score == score, score, 0.0).to(tl.int32, bitcast=True)  # scores are not negative: in their order
    expert = tl.broadcast_to(expert[None, :], (BLOCK_T, BLOCK_G * BLOCK_S))
    slot = tl.arange(0, BLOCK_K)[None, :]
    ids = tl.full((BLOCK_T, BLOCK_K), 0, tl.int32)
    weights = tl.full((BLOCK_T, BLOCK_K), 0.0, tl.float32)
    total = tl.full((BLOCK_T,), 0.0, tl.float32)
    for j in range(top_k):
        chosen = _first(key, tl.max(key, axis=1), expert, 1)
        its = expert == chosen[:, None]
        s = tl.max(tl.where(its, bits, 0), axis=1).to(tl.float32, bitcast=True)
        key = tl.where(its, GONE, key)
        total += s
        ids = tl.where(slot == j, chosen[:, None], ids)
        weights = tl.where(slot == j, s[:, None], weights)

    if NORMALIZE:
        weights = tl.div_rn(weights, tl.broadcast_to((total + 1e-20)[:, None], (BLOCK_T, BLOCK_K)))
    mask = rows[:, None] & (slot < top_k)
    tl.atomic_add(counts_ptr + ids, 1, mask=mask, sem="relaxed")  # integers: exact in any order
    if map_ptr is not None:
        ids = tl.load(map_ptr + ids.to(tl.int64) * map_strides[0], mask=mask, other=0)
    tl.store(ids_ptr + t[:, None] * top_k + slot, ids, mask=mask)
    tl.store(weights_ptr + t[:, None] * top_k + slot, weights * scale, mask=mask)


@triton.jit(do_not_specialize=["tokens", "top_k", "scale"])
def _route_bwd_kernel(
    grad_ptr, grad_strides, logits_ptr, logits_strides, ids_ptr, ids_strides, out_ptr,
    tokens, experts, top_k, scale,
    SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_T tokens; the sums over the chosen go in the order of the slots."""
    expert = tl.arange(0, BLOCK_E)
    valid = (expert < experts)[None, :]
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)  # int64: tokens * stride passes 2^31
    rows = t < tokens
    mask = rows[:, None] & valid
    at = t[:, None] * logits_strides[0] + expert.to(tl.int64)[None, :] * logits_strides[1]
    score = _scores(widen(tl.load(logits_ptr + at, mask=mask, other=0.0)), valid, SOFTMAX)
    score = tl.where(valid & (score == score), score, 0.0)
    grad_at, ids_at = grad_ptr + t * grad_strides[0], ids_ptr + t * ids_strides[0]

    total = tl.full((BLOCK_T,), 1.0, tl.float32)
    shift = tl.full((BLOCK_T,), 0.0, tl.float32)
    if NORMALIZE:
        total = tl.full((BLOCK_T,), 0.0, tl.float32)
        for j in range(top_k):
            chosen = tl.load(ids_at + j * ids_strides[1], mask=rows, other=-1)
            s = tl.sum(tl.where(expert[None, :] == chosen[:, None], score, 0.0), axis=1)
            g = tl.load(grad_at + j * grad_strides[1], mask=rows, other=0.0) * scale
            total += s
            shift += g * s
        total += 1e-20
        shift = tl.div_rn(shift, total)

    grad = tl.full((BLOCK_T, BLOCK_E), 0.0, tl.float32)
    for j in range(top_k):
        chosen = tl.load(ids_at + j * ids_strides[1], mask=rows, other=-1)
        g = tl.load(grad_at + j * grad_strides[1], mask=rows, other=0.0) * scale
        if NORMALIZE:
            g = tl.div_rn(g - shift, total)
        grad = tl.where(expert[None, :] == chosen[:, None], g[:, None], grad)
    if SOFTMAX:
        grad = score * (grad - tl.sum(grad * score, axis=1)[:, None])
    else:
        grad = grad * score * (1.0 - score)
    tl.store(out_ptr + t[:, None] * experts + expert[None, :], narrow(grad, out_ptr.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------- launchers


def _blocks(experts: int, n_group: int, topk_group: int, top_k: int) -> dict[str, int]:
    """The lanes of a row and what else depends on the sizes; where all groups take part there is but one."""
    limited = topk_group < n_group
    groups = n_group if limited else 1
    size = experts // groups
    block_g, block_s = triton.next_power_of_2(groups), triton.next_power_of_2(size)
    warps = triton.cdiv(block_g * block_s, LANES)
    return {
        "LIMITED": limited, "PAIRS": size > 1, "BLOCK_T": TOKENS, "BLOCK_G": block_g, "BLOCK_S": block_s,
        "BLOCK_K": triton.next_power_of_2(top_k), "num_warps": warps if warps == 1 else 2 * warps,
    }  # fmt: skip


def moe_route(
    logits: Tensor, bias: Tensor | None = None, expert_map: Tensor | None = None, *, top_k: int, n_group: int = 1,
    topk_group: int = 1, score: str = "sigmoid", normalize: bool = True, scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, experts = logits.shape
    ids = logits.new_empty(tokens, top_k, dtype=torch.int32)
    weights = logits.new_empty(tokens, top_k, dtype=torch.float32)
    counts = logits.new_zeros(experts, dtype=torch.int32)
    flags = logits.new_empty(tokens, dtype=torch.int32)
    if tokens == 0:
        return ids, weights, counts, flags
    blocks = _blocks(experts, n_group, topk_group, top_k)
    groups = n_group if blocks["LIMITED"] else 1
    with guard(logits):
        _route_kernel[(triton.cdiv(tokens, TOKENS),)](
            logits, logits.stride(), bias, (1,) if bias is None else bias.stride(),
            expert_map, (1,) if expert_map is None else expert_map.stride(), ids, weights, counts, flags,
            tokens, groups, experts // groups, topk_group, top_k, float(scale),
            SOFTMAX=score == "softmax", NORMALIZE=normalize, enable_fp_fusion=False, **blocks,
        )  # fmt: skip
    return ids, weights, counts, flags


def moe_route_bwd(
    grad_weights: Tensor, logits: Tensor, ids: Tensor, *, score: str = "sigmoid", normalize: bool = True,
    scale: float = 1.0,
) -> Tensor:  # fmt: skip
    (tokens, experts), top_k = logits.shape, ids.shape[1]
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if tokens == 0:
        return grad_logits
    block = triton.next_power_of_2(experts)
    with guard(logits):
        _route_bwd_kernel[(triton.cdiv(tokens, TOKENS),)](
            grad_weights, grad_weights.stride(), logits, logits.stride(), ids, ids.stride(), grad_logits,
            tokens, experts, top_k, float(scale),
            SOFTMAX=score == "softmax", NORMALIZE=normalize, BLOCK_T=TOKENS, BLOCK_E=block,
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    return grad_logits


def compile_cases(arch: int):
    pointers = {"bias_ptr": "*fp32", "map_ptr": "*i32", "ids_ptr": "*i32", "counts_ptr": "*i32", "flags_ptr": "*i32"}
    strides = {f"{t}_strides": ("i32:16", 1) for t in ("logits", "grad")} | {"ids_strides": ("i32", 1)}
    sizes = {name: "i32" for name in ("tokens", "n_group", "topk_group", "top_k")} | {"scale": "fp32"}
    types = {"weights_ptr": "*fp32", "grad_ptr": "*fp32", "bias_strides": (1,), "map_strides": (1,)}
    types |= {"experts": "i32:16"} | pointers | strides | sizes
    shapes = {  # experts, n_group, topk_group, top_k: Nano, Super, Kimi K3, the largest, DeepSeek-V3, odd groups
        "nano": (128, 1, 1, 6), "super": (512, 1, 1, 22), "kimi": (896, 1, 1, 16), "largest": (1024, 1, 1, 32),
        "groups": (256, 8, 4, 8), "uneven": (645, 5, 2, 8), "single": (64, 64, 8, 8),
    }  # fmt: skip
    for name, shape in shapes.items():
        blocks = _blocks(*shape)
        options = {"num_warps": blocks.pop("num_warps"), "enable_fp_fusion": False}
        for dtype in ("fp32", "fp16", "bf16") if name == "super" else ("fp32",):
            for score in ("sigmoid", "softmax"):
                own = types | {"logits_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
                own["group_size"] = "i32" if name in ("uneven", "single") else "i32:16"
                flags = {"SOFTMAX": score == "softmax", "NORMALIZE": True}
                given = {} if name in ("super", "groups") else {"map_ptr": None}
                yield Case(
                    f"route-{name}-{dtype}-{score}", _route_kernel,
                    {n: t for n, t in own.items() if n in _route_kernel.arg_names and n not in given},
                    {**flags, **blocks, **given}, options,
                )  # fmt: skip
                yield Case(
                    f"route-bwd-{name}-{dtype}-{score}", _route_bwd_kernel,
                    {n: t for n, t in own.items() if n in _route_bwd_kernel.arg_names},
                    {**flags, "BLOCK_T": blocks["BLOCK_T"], "BLOCK_E": triton.next_power_of_2(shape[0])},
                    {"num_warps": 1, "enable_fp_fusion": False},
                )  # fmt: skip
