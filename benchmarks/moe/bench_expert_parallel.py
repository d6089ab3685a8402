"""The routed experts on two processes against one: the same tokens, half of the experts each, gloo between them.

A call on two ranks is timed on rank 0, from its start to its rows; rank 1 waits for a word before each call. Each rank
has one thread, and so has the operator on one.
"""

from __future__ import annotations

import os
import tempfile
from functools import lru_cache
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist

from n3kernels.distributed import ExpertParallel
from n3kernels.moe import reference

from ..conftest import DEVICE, sizes
from ..shapes import EXPERTS

OP = "moe_experts"
RANKS, ACTIVE = 2, 32  # experts in memory, all on both ranks; each computes with its half
TOKENS = (1, 32)  # of each rank

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="two gloo processes on one CPU")


class Problem:
    def __init__(self, size: str, tokens: int):
        torch.manual_seed(0)
        k, width, inner = EXPERTS[size]
        num_experts, total = max(ACTIVE, k), RANKS * tokens
        self.z = torch.randn(total, width, dtype=torch.bfloat16)
        self.w_up = (torch.randn(num_experts, inner, width) * width**-0.5).bfloat16()
        self.w_down = (torch.randn(num_experts, width, inner) * inner**-0.5).bfloat16()
        self.ids, self.weights, counts, _ = reference.moe_route(torch.randn(total, num_experts), top_k=k)
        self.num_experts, self.tokens = num_experts, tokens
        self.bytes = 2 * int((counts > 0).sum()) * 2 * width * inner + 4 * self.z.numel()
        self.flops = 4 * total * k * width * inner

    def part(self, rank: int) -> tuple[torch.Tensor, ...]:
        rows = slice(rank * self.tokens, (rank + 1) * self.tokens)
        return self.z[rows], self.ids[rows], self.weights[rows]


problem = lru_cache(1)(Problem)


def join(rank: int, path: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.FileStore(path, RANKS), rank=rank, world_size=RANKS)


def serve(rank: int, path: str, pipe) -> None:
    """Rank 1: calls whenever it is told to."""
    torch.set_num_threads(1)
    join(rank, path)
    while (order := pipe.recv()) is not None:
        size, tokens, mode = order
        p = problem(size, tokens)
        ep = ExpertParallel(p.num_experts, mode=mode)
        w_up, w_down = ep.shard(p.w_up), ep.shard(p.w_down)
        pipe.send("ready")
        while pipe.recv():
            ep(*p.part(rank), w_up, w_down)


@pytest.fixture(scope="module")
def other():
    """The pipe to rank 1; this process is rank 0."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        context, path = get_context("spawn"), os.path.join(folder, "store")
        pipe, theirs = context.Pipe()
        process = context.Process(target=serve, args=(1, path, theirs), daemon=True)
        process.start()
        join(0, path)
        yield pipe
        pipe.send(None)
        process.join(10)
        dist.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("provider", ["one rank", "gather", "all_to_all"])
@pytest.mark.parametrize("tokens", sizes(TOKENS, quick=[1]))
@pytest.mark.parametrize("size", sizes(["demo", "super"], quick=["demo"]))
def test_expert_parallel(measure, other, size, tokens, provider):
    p = problem(size, tokens)
    whole = p.z, p.w_up, p.w_down, p.ids, p.weights
    truth = reference.moe_experts(*(t.double() if t.is_floating_point() else t for t in whole))
    facts = {"group": f"{OP} on {RANKS} ranks, {size}, T={tokens} each", "bytes": p.bytes, "flops": p.flops}
    if provider == "one rank":
        measure(OP, provider, torch.ops.n3.moe_experts.default, whole, truth, tolerance=3e-3, **facts)
        return
    ep = ExpertParallel(p.num_experts, mode=provider)
    w_up, w_down = ep.shard(p.w_up), ep.shard(p.w_down)
    other.send((size, tokens, provider))
    assert other.recv() == "ready"

    def call(z, ids, weights):
        other.send(True)
        return ep(z, ids, weights, w_up, w_down)

    try:
        measure(OP, provider, call, p.part(0), truth[:tokens], tolerance=3e-3, **facts)
    finally:
        other.send(False)
