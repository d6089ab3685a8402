"""mtp_verify_tree: every row that a walk may reach is a unit; then one program per request walks from its root.

A tree is a tuple: tokens and parents by row, first row of the request and its rows. Rows are counted from the first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import Case, device_function, guard
from ..mamba.launch import dense
from .accept import against_support, by_tile, entries_of
from .chains import (
    EOS,
    NOISE,
    accept_uniform,
    ends_sequence,
    final_uniform,
    flag_of_draft,
    law_of_row,
    logprob_of,
    masses_of_row,
    pick_tile,
    pick_token,
    prob_of,
    tile_law,
    total_of,
)  # fmt: skip
from .numerics import NOWHERE, TILE, first_of, largest, total
from .rows import BIASES, EDITED, FLAG_OUT_OF_RANGE, PLAIN, SIZES, SPARSE, Rows, case_types
from .sample import draw

__all__ = ["compile_cases", "mtp_verify_tree"]

NODES = 64  # that are looked at at once
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
WALK = {"num_warps": 1, "enable_fp_fusion": False}


# ---------------------------------------------------------------- trees


@device_function
def _tree_of(nodes, requests, n_rows, slots, b):
    """A request's tree, its slot, and 1 if it has a root and a slot."""
    cu_ptr, slot_ptr = requests
    slot = b
    if slot_ptr is not None:
        slot = tl.load(slot_ptr + b)
    first = tl.minimum(tl.maximum(tl.load(cu_ptr + b), 0), n_rows)
    count = tl.minimum(tl.maximum(tl.load(cu_ptr + b + 1), 0), n_rows) - first
    live = tl.where((slot >= 0) & (slot < slots) & (count > 0), 1, 0)
    return (nodes[0] + first, nodes[1] + first, first, count), slot, live


@device_function
def _next_child(tree, node, after, NODES: tl.constexpr):
    """The first child of a node behind the row ``after``; NOWHERE if there is none."""
    child = after - after + NOWHERE
    for start in range(after + 1, tree[3], NODES):
        j = start + tl.arange(0, NODES)
        its = tl.load(tree[1] + j, mask=j < tree[3], other=-1) == node
        child = tl.minimum(child, first_of(its & (tl.load(tree[0] + j, mask=j < tree[3], other=-1) >= 0), j))
    return child


@device_function
def _child_with(tree, node, token, vocab, NODES: tl.constexpr):
    """The first child of a node that has a token, NOWHERE if none has; the flag of a child past the vocabulary."""
    child = node - node + NOWHERE
    past = node - node
    for start in range(node + 1, tree[3], NODES):
        j = start + tl.arange(0, NODES)
        tokens = tl.load(tree[0] + j, mask=j < tree[3], other=-1)
        its = tl.load(tree[1] + j, mask=j < tree[3], other=-1) == node
        child = tl.minimum(child, first_of(its & (tokens == token), j))
        past |= largest(tl.where(its & (tokens >= vocab), FLAG_OUT_OF_RANGE, 0))
    return child, past


@triton.jit(do_not_specialize=["n_rows", "slots", "max_depth"])
def _rows_kernel(
    nodes, requests, pos_ptr, slot_of_row_ptr, pos_of_row_ptr, n_rows, slots, max_depth, NODES: tl.constexpr
):
    """One program per request: slot and position of each row that a walk may reach. ``slot_of_row_ptr`` holds -1s."""
    b = tl.program_id(0)
    tree, slot, live = _tree_of(nodes, requests, n_rows, slots, b)
    count = tl.where(live != 0, tree[3], 0)
    for start in range(0, count, NODES):
        j = start + tl.arange(0, NODES)
        node = tl.where(j < count, j, 0)
        reached = j < count
        depth = tl.zeros((NODES,), tl.int32)
        last = largest(node)
        while last > 0:  # all of them up to the root
            below = node > 0
            parent = tl.load(tree[1] + node, mask=below, other=0)
            token = tl.load(tree[0] + node, mask=below, other=0)
            fits = (parent >= 0) & (parent < node) & (token >= 0)
            reached = reached & (fits | (node == 0))
            depth += below.to(tl.int32)
            node = tl.where(below & fits, parent, 0)
            last = largest(node)
        at = tree[2] + j
        tl.store(slot_of_row_ptr + at, tl.where(reached & (depth <= max_depth), slot, -1), mask=j < count)
        tl.store(pos_of_row_ptr + at, tl.load(pos_ptr + b) + depth, mask=j < count)


@device_function
def _put(stored, b, width, depth, token, row, logprob):
    at = b.to(tl.int64) * width + depth
    tl.store(stored[0] + at, token)
    tl.store(stored[2] + at, row)
    tl.store(stored[3] + at, logprob.to(tl.float32))


# ---------------------------------------------------------------- modes greedy and coupled


@triton.jit(do_not_specialize=["n_rows", "slots", "max_depth", "eos_count"])
def _follow_kernel(
    nodes, requests, own, n_rows, slots, vocab, max_depth, eos_ptr, eos_count, stored, NODES: tl.constexpr
):
    """One program per request: the target's own tokens, as long as a child has them. ``stored`` holds what padding
    emits."""
    b = tl.program_id(0)
    tree, slot, going = _tree_of(nodes, requests, n_rows, slots, b)
    flags = tl.where(slot >= slots, FLAG_OUT_OF_RANGE, 0)
    node = b - b
    depth = node
    while going != 0:
        row = tree[2] + node
        token = tl.load(own[0] + row)
        _put(stored, b, max_depth + 1, depth, token, row, tl.load(own[1] + row))
        flags |= tl.load(own[2] + row)
        child = node - node + NOWHERE
        if depth < max_depth:
            child, past = _child_with(tree, node, token, vocab, NODES)
            flags |= past
        follows = (child != NOWHERE) & (ends_sequence(token, eos_ptr, eos_count) == 0)
        going = tl.where(follows, 1, 0)
        node = tl.where(follows, child, node)
        depth += 1
    tl.store(stored[1] + b, depth)
    tl.store(stored[4] + b, flags)


# ---------------------------------------------------------------- mode token


@device_function
def _without_children(tree, node, through, ids, p, NODES: tl.constexpr):
    """p of some tokens, 0 for those of a node's children up to one."""
    child = _next_child(tree, node, node, NODES)
    while child <= through:
        p = tl.where(ids == tl.load(tree[0] + child), 0.0, p)
        child = _next_child(tree, node, child, NODES)
    return p


@device_function
def _support_of(token, p, ids, w, lowest, entries, BLOCK_M: tl.constexpr):
    """Weights of the tokens of a tile, those of the support in their places."""
    lane = tl.arange(0, BLOCK_M)
    for j in range(entries):
        one = largest(tl.where(lane == j, token, -1))
        if (one >= lowest) & (one < lowest + TILE):
            w = tl.where(ids == one, total(tl.where(lane == j, p, 0.0)), w)
    return w


@triton.jit(do_not_specialize=["sizes", "max_depth", "eos_count"])
def _sibling_kernel(
    logits, nodes, requests, params, edits, laws, records, sizes, seed_ptr, pos_ptr, uniforms_ptr, max_depth,
    eos_ptr, eos_count, stored,
    FILTERED: tl.constexpr, BLOCK_M: tl.constexpr, TILES: tl.constexpr, BIASES: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """One program per request: of each node the first child that is accepted. ``stored`` holds what padding emits.

    What is left of p after rejections is, of tokens of the support, ``p``, and of others their p times ``share``;
    ``outside`` has the others' masses by tile. Children without a law are certain; then there is no support, and the
    tile of one that is rejected is summed again without it.
    """
    b, vocab = tl.program_id(0), logits[2]
    tree, slot, going = _tree_of(nodes, requests, sizes[0], sizes[1], b)
    flags = tl.where(slot >= sizes[1], FLAG_OUT_OF_RANGE, 0)
    node = b - b
    depth = node
    while going != 0:
        row = (tree[2] + node).to(tl.int64)
        seed, pos = tl.load(seed_ptr + slot), tl.load(pos_ptr + b) + depth
        law = law_of_row(logits, params, edits, records, sizes, tree[2] + node, row, slot, TILES, FILTERED)
        flags |= law[3]
        tile_lane = tl.arange(0, TILES)
        if laws is not None:
            support, p, q, outside, z = against_support(logits, edits, laws, sizes, row, law, TILES, BLOCK_M, BIASES)
            at_first = p
        else:
            z = total_of(law)
            outside = masses_of_row(law, z, TILES)
        share = tl.full((), 1.0, tl.float64)
        through = node  # children up to here were rejected
        child = node - node + NOWHERE
        if depth < max_depth:
            child = _next_child(tree, node, node, NODES)
        sibling = pos - pos + 1
        accepted = node - node
        token = node - node - 1
        logprob = tl.full((), 0.0, tl.float64)
        while (child != NOWHERE) & (accepted == 0):
            token = tl.load(tree[0] + child)
            if laws is not None:
                its = support == token
                p_draft, q_draft = total(tl.where(its, p, 0.0)), total(tl.where(its, q, 0.0))
                own_p = total(tl.where(its, at_first, 0.0))
            else:
                own_p = prob_of(logits, edits, sizes, row, law, z, token, BIASES)[0]
                before = _child_with(tree, node, token, vocab, NODES)[0] < child  # it was taken away already
                p_draft, q_draft = tl.where(before, 0.0, own_p * share), own_p - own_p + 1.0
            flag, drawn = flag_of_draft(token, q_draft, vocab)
            flags |= flag
            u = accept_uniform(uniforms_ptr, (tree[2] + child).to(tl.int64), seed, pos, sibling)
            accepted = tl.where(drawn & (p_draft > 0.0) & (u * q_draft < p_draft), 1, 0)
            logprob = tl.log(tl.where(own_p > 0.0, own_p, 1.0))
            if accepted == 0:
                through = child
                if drawn:
                    if laws is not None:
                        left = tl.maximum(p - q, 0.0)
                        rest = outside
                    else:
                        rest = outside
                        if p_draft > 0.0:
                            ids, p_of, _ = tile_law(logits, edits, sizes, row, law, z, token // TILE, BIASES)
                            p_of = _without_children(tree, node, through, ids, p_of, NODES)
                            rest = tl.where(tile_lane == token // TILE, total(p_of) * share, outside)
                    remaining = total(rest)
                    if laws is not None:
                        remaining += total(left)
                    if remaining > 0.0:
                        if laws is not None:
                            p = left / remaining
                        outside = rest / remaining
                        share = share / remaining
                child = _next_child(tree, node, child, NODES)
                sibling += 1
        if accepted == 0:
            mass = outside
            if laws is not None:
                mass += by_tile(support, p, TILES, BLOCK_M)
            u = final_uniform(uniforms_ptr, row, seed, pos)
            tile, passed, wanted = pick_tile(mass, u, TILES)
            ids, p_of, otherwise = tile_law(logits, edits, sizes, row, law, z, tile, BIASES)
            w = p_of * share
            if laws is not None:
                w = _support_of(support, p, ids, w, tile * TILE, laws[4], BLOCK_M)
            else:
                w = _without_children(tree, node, through, ids, w, NODES)
            token = pick_token(w, ids, otherwise, passed, wanted)
            logprob = logprob_of(logits, edits, sizes, row, law, z, token, BIASES)
        _put(stored, b, max_depth + 1, depth, token, tree[2] + node, logprob)
        follows = (accepted != 0) & (ends_sequence(token, eos_ptr, eos_count) == 0)
        going = tl.where(follows, 1, 0)
        node = tl.where(follows, child, node)
        depth += 1
    tl.store(stored[1] + b, depth)
    tl.store(stored[4] + b, flags)


# ---------------------------------------------------------------- host side


def mtp_verify_tree(
    logits: Tensor, node_tokens: Tensor, parents: Tensor, cu_rows: Tensor, seed: Tensor, pos: Tensor, *,
    mode: str = "greedy", max_depth: int, slot=None, eos_ids=None, draft_ids=None, draft_probs=None, draft_vocab=None,
    uniforms=None, **options,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, requests, width = logits.shape[0], cu_rows.shape[0] - 1, max_depth + 1
    tokens, path = (seed.new_full((requests, width), -1, dtype=torch.int32) for _ in range(2))
    logprobs = seed.new_zeros(requests, width, dtype=torch.float32)
    num_emitted, flags = (seed.new_zeros(requests, dtype=torch.int32) for _ in range(2))
    stored = tokens, num_emitted, path, logprobs, flags
    if requests == 0:
        return stored
    nodes, batch = (dense(node_tokens), dense(parents)), (dense(cu_rows), dense(slot))
    eos = dense(eos_ids), 0 if eos_ids is None else len(eos_ids)
    slot_of_row, pos_of_row = seed.new_full((n,), -1, dtype=torch.int32), seed.new_zeros(n)
    with guard(logits):
        _rows_kernel[(requests,)](
            nodes, batch, dense(pos), slot_of_row, pos_of_row, n, seed.shape[0], max_depth, NODES=NODES, **WALK
        )
    laws, entries = None, 0
    if draft_ids is not None:
        entries, mapped = draft_ids.shape[1], 0 if draft_vocab is None else len(draft_vocab)
        laws = nodes[0], dense(draft_ids), dense(draft_probs), dense(draft_vocab), entries, mapped
    rows = Rows.measure(logits, seed, n, slot=slot_of_row, laws=laws, greedy=mode == "greedy", **options)
    if mode == "token":
        with guard(logits):
            _sibling_kernel[(requests,)](
                rows.logits, nodes, batch, rows.params, rows.edits, laws, rows.records, rows.sizes, dense(seed),
                dense(pos), dense(uniforms), max_depth, *eos, stored, FILTERED=rows.records[4] is not None,
                BLOCK_M=entries_of(entries), TILES=rows.flags["TILES"], BIASES=BIASES, NODES=NODES, **OPTIONS,
            )  # fmt: skip
        return stored
    own = draw(rows, seed, pos_of_row, n, mode == "greedy")
    with guard(logits):
        _follow_kernel[(requests,)](
            nodes, batch, own, n, seed.shape[0], logits.shape[1], max_depth, *eos, stored, NODES=NODES, **WALK
        )
    return stored


def compile_cases(arch: int):
    blocks = {"NODES": NODES}
    tree = {"nodes": ("*i32", "*i32"), "requests": ("*i32", "*i32")}
    stored = {"stored": ("*i32", "*i32", "*i32", "*fp32", "*i32"), "max_depth": "i32"}
    sizes = {"n_rows": "i32", "slots": "i32"}
    rows = {"pos_ptr": "*i64", "slot_of_row_ptr": "*i32", "pos_of_row_ptr": "*i64", "max_depth": "i32"}
    yield Case("rows", _rows_kernel, tree | rows | sizes, blocks, WALK)
    own = {"own": ("*i32", "*fp32", "*i32"), "vocab": "i32:16"}
    yield Case("follow", _follow_kernel, tree | sizes | own | EOS | stored, blocks, WALK)
    for dtype, laws in (("bf16", None), ("bf16", SPARSE), ("fp32", SPARSE)):
        types = case_types(dtype, EDITED if laws else PLAIN, laws=laws) | {"sizes": SIZES} | tree | stored | NOISE | EOS
        types |= {"uniforms_ptr": "*fp64"}
        constants = {"FILTERED": laws is not None, "BLOCK_M": 64, "TILES": 32, "BIASES": BIASES, **blocks}
        absent = {} if laws else {"laws": None}
        name = f"token-{'sparse' if laws else 'certain'}-{dtype}"
        yield Case(name, _sibling_kernel, types, constants | absent, OPTIONS)
