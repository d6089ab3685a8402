"""ExpertParallel in 1, 2 and 4 gloo processes, and its plan for more without any. The ranks' side is ep_ranks.py."""

from __future__ import annotations

import math
import re

import ep_ranks
import pytest
import torch
import torch.distributed as dist
from conftest import assert_same_bits
from ep_ranks import Ranks, call, mine, problem, rel_l2, unsharded
from hypothesis import given
from hypothesis import strategies as st

from n3kernels.distributed import ExpertParallel, plan_traffic
from n3kernels.distributed.plan import replicate
from n3kernels.moe import experts

OPS = ("moe_experts", "moe_experts_bwd")
PLANS = {
    "gather": {"mode": "gather"},
    "gather fast": {"mode": "gather", "combine": "fast"},
    "gather exact": {"mode": "gather", "combine": "exact"},
    "all_to_all": {"mode": "all_to_all"},
    "all_to_all exact": {"mode": "all_to_all", "combine": "exact"},
    "all_to_all padded": {"mode": "all_to_all", "capacity": 8},
    "gather padded": {"mode": "gather", "capacity": 8},
}
UNEVEN = {2: [5, 3], 4: [4, 0, 7, 2]}  # tokens of each rank
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
sizes = pytest.mark.parametrize("n", [2, 4])


def start(tmp_path_factory, size):
    """Processes without a GPU: gloo takes tensors of the CPU, and several ranks share a machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("OMP_NUM_THREADS", "1")
        return Ranks(size, tmp_path_factory.mktemp("ranks") / "store")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    processes = start(tmp_path_factory, 4)
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def alone():
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield None
    dist.destroy_process_group()


# ---------------------------------------------------------------- the plan, for any number of ranks


def uniform_ids(tokens, num_experts, k):
    return torch.rand(tokens, num_experts).topk(k).indices.int()


# KiB of rows per token with 1024 bfloat16 of latent width, top-22 of 512: the figures of the published estimate, which
# draws experts with replacement; without, a token meets up to 1.2 % more ranks.
@pytest.mark.parametrize("n, table", [(8, 13.3), (16, 22.7), (32, 31.0)])
def test_bytes_with_one_row_for_each_rank(n, table):
    width, num_experts, k = 1024, 512, 22
    ids = [uniform_ids(128, num_experts, k) for _ in range(n)]
    plans = plan_traffic(ids, num_experts, width, mode="all_to_all")
    local = num_experts // n
    for r, (rows, plan) in enumerate(zip(ids, plans, strict=True)):
        hit = [{e // local for e in row} - {r} for row in rows.tolist()]
        slots = sum(e // local != r for row in rows.tolist() for e in row)
        assert plan.rows == sum(map(len, hit))
        exact = plan.rows * 2 * width + slots * (4 + 2) + plan.rows  # weight, id; and the number of slots of a row
        assert exact <= plan.dispatched < exact + 16 * n  # whole 16 bytes for each rank
    tokens = sum(p.tokens for p in plans)
    row_kib = sum(p.rows for p in plans) * 2 * width / tokens / 1024
    missed = math.comb(num_experts - local, k) / math.comb(num_experts, k)
    assert row_kib == pytest.approx((n - 1) * (1 - missed) * 2, rel=0.01)
    assert row_kib <= table * 1.02
    assert sum(p.dispatched for p in plans) / tokens / 1024 <= 1.01 * row_kib  # ids and weights: less than 1 %
    assert sum(p.combined for p in plans) == sum(p.rows for p in plans) * 2 * width
    assert row_kib < 0.9 * k * 2 * (n - 1) / n  # one row for each expert elsewhere


def test_bytes_of_a_gather():
    ids = [uniform_ids(t, 512, 22) for t in (3, 5, 0, 1)]
    for plan in plan_traffic(ids, 512, 1024):
        assert plan.rows == 3 * 5 and plan.combined == 15 * 2048
        assert plan.dispatched == 3 * math.ceil(5 * (2048 + 22 * 6) / 16) * 16


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 20))
def test_virtual_ranks_add_up(n, num_experts, tokens):
    """Experts range by range in one process: their sum is the whole, and rows without a local expert are zeros."""
    p = problem([tokens], num_experts=num_experts)
    bounds = [num_experts * r // n for r in range(n + 1)]
    y = torch.zeros_like(p.z)
    for first, end in zip(bounds, bounds[1:], strict=False):
        if first < end:
            w_up, w_down = p.w_up[first:end], p.w_down[first:end]
            part = experts(p.z, w_up, w_down, p.ids, p.weights, first_expert=first)
            local = ((p.ids >= first) & (p.ids < end)).any(1)
            assert not part[~local].any()
            y += part
    assert rel_l2(y, unsharded(p)) <= 1e-6


def test_replicas_share_the_tokens():
    """Evenly, and each token by its own row: neither its place nor its neighbours matter."""
    z, table = torch.randn(4000, 8, dtype=torch.bfloat16), torch.tensor([[0, 2, 3], [1, -1, -1]], dtype=torch.int32)
    ids = torch.tensor([[0, 1, 5, -1]], dtype=torch.int32).expand(4000, 4)
    physical = replicate(ids, table, z)
    assert (physical[:, 1] == 1).all() and (physical[:, 2:] == -1).all()
    assert all(1200 < (physical[:, 0] == p).sum() < 1470 for p in (0, 2, 3))
    assert_same_bits(replicate(ids[:1500], table, z.flip(0)[:1500]), physical.flip(0)[:1500])


# ---------------------------------------------------------------- one rank


@every_plan
@pytest.mark.parametrize("form", ["dense", "nvfp4"])
def test_alone_it_is_the_operator(alone, plan, form):
    p = problem([7], form=form)
    ep = ExpertParallel(p.num_experts, **plan)
    assert ep.local_experts == list(range(p.num_experts))
    assert rel_l2(call(ep, p, mine(p, None)), unsharded(p)) <= 1e-6
    traffic = ep.last_traffic
    assert (traffic.tokens, traffic.rows, traffic.dispatched, traffic.combined, traffic.control) == (7, 0, 0, 0, 0)


def test_strided_arguments(alone):
    p = problem([6])
    ep = ExpertParallel(p.num_experts)
    y = call(ep, p, slice(0, 6))
    for name in ("z", "ids", "weights"):
        t = getattr(p, name)
        setattr(p, name, torch.stack((t, t), -1)[..., 0])
    assert_same_bits(call(ep, p, slice(0, 6)), y)


def test_under_compile(alone):
    """It stands outside of the graphs around it."""
    p = problem([6])
    ep = ExpertParallel(p.num_experts)

    @torch.compile(backend="eager")
    def f(z):
        return ep(2 * z, p.ids, p.weights, p.w_up, p.w_down) + 1

    p.z = 2 * p.z
    assert_same_bits(f(p.z / 2), unsharded(p) + 1)


BAD_PLANS = [
    ({"num_experts": 0}, "num_experts must be at least 1, got 0"),
    ({"mode": "ring"}, "mode must be one of auto, gather, all_to_all, got ring"),
    ({"combine": "sum"}, "combine must be one of ordered, fast, exact, got sum"),
    ({"mode": "all_to_all", "combine": "fast"}, "mode must be gather with combine fast, got all_to_all"),
    ({"capacity": 0}, "capacity must be at least 1, got 0"),
    ({"capacity": 4, "combine": "exact"}, "capacity must be None with combine exact, got 4"),
    ({"splits": [4, 4]}, "splits must have one number for each of 1 ranks, got 2"),
    ({"splits": [7]}, "splits must add up to the 8 experts, got 7"),
    ({"splits": [-1]}, "splits must not be negative, got -1"),
    ({"expert_map": torch.zeros(8)}, "expert_map must be int32, got float32"),
    ({"expert_map": torch.zeros(3, dtype=torch.int32)}, "expert_map must have shape [8], got [3]"),
    ({"expert_map": torch.zeros(8, dtype=torch.int32)}, "expert_map must name a physical expert once at most"),
    ({"expert_map": torch.arange(-1, 7, dtype=torch.int32)},
     "expert_map must give every expert a physical one in the first column"),
    ({"num_experts": 2, "expert_map": torch.tensor([[0, -1, 2], [1, -1, -1]], dtype=torch.int32)},
     "expert_map must have its -1 behind the physical experts of a row"),
    ({"expert_map": torch.arange(8, dtype=torch.int32), "splits": [7]},
     "expert_map must be below the 7 experts of splits, got 7"),
]  # fmt: skip


@pytest.mark.parametrize("options, message", BAD_PLANS)
def test_bad_plans(alone, options, message):
    with pytest.raises(RuntimeError) as error:
        ExpertParallel(**{"num_experts": 8, **options})
    assert str(error.value) == f"n3::expert_parallel: {message}"


def test_without_a_group(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match="group must be given, or torch.distributed.init_process_group"):
        ExpertParallel(8)


# ---------------------------------------------------------------- the same rows as on one rank


@sizes
@every_plan
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_operator(ranks, n, plan, dtype):
    ranks.run(n, ep_ranks.agrees, plan=plan, tokens=UNEVEN[n], dtype=dtype)


@every_plan
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ["relu2", "gelu"])
def test_nvfp4_experts(ranks, plan, dtype, activation):
    ranks.run(2, ep_ranks.agrees, plan=plan, tokens=[5, 3], dtype=dtype, activation=activation, form="nvfp4")


@every_plan
@pytest.mark.parametrize("splits", [[0, 7, 1, 2], [10, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_uneven_experts(ranks, plan, splits, activation):
    """Ranks without experts; all tokens go to one rank."""
    plan = {**plan, "splits": splits}
    ranks.run(4, ep_ranks.agrees, plan=plan, tokens=[3, 1, 0, 5], activation=activation)


@every_plan
@pytest.mark.parametrize("tokens", [[0, 0], [0, 1]], ids=str)
def test_few_tokens(ranks, plan, tokens):
    ranks.run(2, ep_ranks.agrees, plan=plan, tokens=tokens)


@every_plan
def test_fewer_experts_than_ranks(ranks, plan):
    ranks.run(4, ep_ranks.agrees, plan=plan, tokens=[2, 2, 2, 2], num_experts=3, k=1, width=33, inner=7)


@pytest.mark.parametrize("mode", ["gather", "all_to_all"])
@pytest.mark.parametrize("combine", ["ordered", "exact"])
def test_the_shape_of_the_model(ranks, mode, combine):
    """Latent width and top-k of Nemotron 3 Super; fewer and narrower experts."""
    plan = {"mode": mode, "combine": combine}
    ranks.run(2, ep_ranks.agrees, plan=plan, tokens=[9, 8], num_experts=64, k=22, width=1024, dtype=torch.bfloat16)


@pytest.mark.parametrize("mode", ["gather", "all_to_all"])
def test_static_shapes(ranks, mode):
    ranks.run(4, ep_ranks.static_shapes, mode=mode, tokens=[4, 0, 7, 2])


@sizes
def test_beyond_capacity(ranks, n):
    (message, _), *rest = ranks.run(n, ep_ranks.beyond_capacity)
    assert all(other == message for other, _ in rest)
    assert "rank 1: capacity must be at least the 2 rows for one rank, got 1" in message


@pytest.mark.parametrize("mode", ["gather", "all_to_all"])
@pytest.mark.parametrize("combine", ["ordered", "exact"])
def test_replicated_experts(ranks, mode, combine):
    answers = ranks.run(4, ep_ranks.replicas, mode=mode, combine=combine)
    rows = [row for y, _ in answers for row in y]
    assert rows == [row for _, y in answers for row in y][::-1]


@pytest.mark.parametrize("mode", ["gather", "all_to_all"])
def test_a_row_does_not_see_the_batch(ranks, mode):
    ranks.run(4, ep_ranks.rows_are_alone, mode=mode)


@sizes
@every_plan
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_are_the_planned_ones(ranks, n, plan, dtype):
    ranks.run(n, ep_ranks.traffic_is_planned, plan=plan, tokens=UNEVEN[n], dtype=dtype)


# ---------------------------------------------------------------- gradients


@every_plan
@pytest.mark.parametrize("splits", [None, [0, 7, 1, 2]], ids=str)
def test_gradients(ranks, plan, splits):
    plan = {**plan, "splits": splits}
    ranks.run(4, ep_ranks.gradients, plan=plan, tokens=UNEVEN[4], activation="silu")


@pytest.mark.parametrize("mode", ["gather", "all_to_all"])
@pytest.mark.parametrize("frozen", [{(0, 0), (0, 1), (0, 2), (0, 3)}, {(r, i) for r in (0, 1) for i in (0, 1)}],
                         ids=["a rank", "inputs"])  # fmt: skip
def test_gradients_where_some_are_frozen(ranks, mode, frozen):
    ranks.run(2, ep_ranks.gradients, plan={"mode": mode}, tokens=[5, 3], frozen=frozen)


@sizes
def test_gradients_stop_at_nvfp4(ranks, n):
    for message, _ in ranks.run(n, ep_ranks.gradients_stop_at_nvfp4):
        assert message == "n3::expert_parallel: w_up must be dense, got NVFP4: decode it first to train through it"


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("n, form, activation", [(2, "dense", "silu"), (4, "nvfp4", "relu2")])
@pytest.mark.parametrize("combine", ["ordered", "fast", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer(ranks, n, combine, dtype, form, activation):
    ranks.run(n, ep_ranks.layer, combine=combine, dtype=dtype, form=form, activation=activation)


def test_layer_without_latent_width(ranks):
    ranks.run(2, ep_ranks.layer, combine="ordered", dtype=torch.float32, latent=False)


def test_gradients_of_the_layer(ranks):
    ranks.run(2, ep_ranks.layer_gradients)


# ---------------------------------------------------------------- failure: one message, on every rank

LOCAL = {
    "ids": "rank 1: ids must be int32, got int64",
    "rows": "rank 1: weights must have shape [3, 3], got [2, 3]",
    "experts": "rank 1: w_up must have the 5 experts of this rank, got 4",
    "stack": "rank 1: w_down must have shape [5, 32, 48], got [5, 31, 48]",
    "nothing": "rank 1: 'NoneType' object has no attribute 'dtype'",
    "activation": "rank 1: activation must be one of relu2, silu, gelu, got tanh",
    "dtype": "the dtype of z must be float32 as on rank 0, got bfloat16 on rank 1",
    "width": "the last dimension of z must be 32 as on rank 0, got 16 on rank 1",
    "inner": "the inner size of the experts must be 48 as on rank 0, got 16 on rank 1",
    "columns": "the number of columns of ids must be 3 as on rank 0, got 2 on rank 1",
}


@pytest.mark.parametrize("change", LOCAL)
def test_a_bad_call_of_one_rank(ranks, change):
    assert set(ranks.run(2, ep_ranks.bad_call, at=1, change=change)) == {f"n3::expert_parallel: {LOCAL[change]}"}


@pytest.mark.parametrize("at", [0, 3])
def test_a_bad_call_of_any_rank(ranks, at):
    messages = set(ranks.run(4, ep_ranks.bad_call, at=at, change="ids"))
    assert messages == {f"n3::expert_parallel: rank {at}: ids must be int32, got int64"}


MIXED = [
    ({}, {"mode": "all_to_all"}, "mode must be gather as on rank 0, got all_to_all on rank 1"),
    ({}, {"combine": "exact"}, "combine must be ordered as on rank 0, got exact on rank 1"),
    ({"capacity": 9}, {}, "capacity must be 9 as on rank 0, got None on rank 1"),
    ({}, {"splits": [4, 6]}, "splits must be those of digest [0-9a-f]{8} as on rank 0, got those of digest [0-9a-f]{8} "
     "on rank 1"),
    ({}, {"expert_map": torch.arange(10, dtype=torch.int32)},
     "expert_map must be None as on rank 0, got that of digest [0-9a-f]{8} on rank 1"),
]  # fmt: skip


@pytest.mark.parametrize("first, second, message", MIXED)
def test_plans_that_differ(ranks, first, second, message):
    one, two = ranks.run(2, ep_ranks.other_plan, plans=[first, second])
    assert one == two and re.fullmatch("n3::expert_parallel: " + message, one)


def test_gradients_on_some_ranks(ranks):
    rule = "gradients must be enabled on every rank or wanted on none, got torch.is_grad_enabled() False on rank 1"
    assert set(ranks.run(2, ep_ranks.other_gradients, at=1)) == {f"n3::expert_parallel: {rule}"}


def test_a_bad_layer_on_one_rank(ranks):
    messages = set(ranks.run(2, ep_ranks.bad_layer, at=1))
    assert messages == {"n3::expert_parallel: rank 1: n3::moe_route: top_k must be between 1 and 5, got 99"}


def test_a_rank_that_does_not_call(ranks):
    (message, seconds), _ = ranks.run(2, ep_ranks.one_stays_away, seconds=2)
    assert "n3::expert_parallel: rank 0 of 2 could not complete the exchange of headers: another rank" in message
    assert seconds < 10


def test_a_rank_that_ends(tmp_path_factory):
    processes = start(tmp_path_factory, 2)
    try:
        for pipe in processes.pipes:
            pipe.send((ep_ranks.one_ends.__name__, 2, {}))
        assert processes.pipes[0].poll(ep_ranks.LIMIT)
        error, (message, seconds) = processes.pipes[0].recv()
    finally:
        processes.close()
    assert error is None and "rank 0 of 2 could not complete the exchange of headers: another rank ended" in message
    assert seconds < 10
