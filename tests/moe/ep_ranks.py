"""Processes that wait for work, one per rank, and the work they do: the ranks' side of test_expert_parallel.py."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from datetime import timedelta
from multiprocessing import get_context
from types import SimpleNamespace

import torch
import torch.distributed as dist
from conftest import assert_same_bits
from moe_problems import nvfp4

from n3kernels import _dispatch
from n3kernels.distributed import ExpertParallel, plan_traffic
from n3kernels.moe import experts, latent_moe

LIMIT = 60  # seconds: for one piece of work, on a machine that does other things too
TIMEOUT = timedelta(seconds=10)  # of the groups: where one rank fails, the others wait so long


# ---------------------------------------------------------------- the processes


class Ranks:
    """``run(n, work, **options)`` calls ``work(group, **options)`` in n processes; returns what each of them did."""

    def __init__(self, size: int, path):
        ctx = get_context("spawn")
        pairs = [ctx.Pipe() for _ in range(size)]
        self.pipes = [ours for ours, _ in pairs]
        self.processes = [
            ctx.Process(target=_serve, args=(rank, size, str(path), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self.processes:
            process.start()

    def run(self, n, work, **options):
        for pipe in self.pipes[:n]:
            pipe.send((work.__name__, n, options))
        end, answers = time.monotonic() + LIMIT, []
        for r, pipe in enumerate(self.pipes[:n]):
            if not pipe.poll(max(end - time.monotonic(), 0)):
                self.close()
                raise TimeoutError(f"rank {r} of {n} did not finish {work.__name__}")
            answers.append(pipe.recv())
        errors = [f"rank {r} of {n}:\n{error}" for r, (error, _) in enumerate(answers) if error]
        errors.sort(key=lambda error: "could not complete" in error)  # the cause first, who waited for it behind
        assert not errors, errors[0]
        return [answer for _, answer in answers]

    def close(self):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.join(10)


def _serve(rank, size, path, pipe):
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.FileStore(path, size), rank=rank, world_size=size, timeout=TIMEOUT)
    groups = {n: dist.new_group(range(n), timeout=TIMEOUT) for n in range(2, size)} | {size: None}
    while True:
        name, n, options = pipe.recv()
        torch.manual_seed(0)
        torch.use_deterministic_algorithms(True, warn_only=True)  # every torch.empty is full of NaN
        try:
            answer = None, globals()[name](groups[n], **options)
        except BaseException:
            answer = traceback.format_exc(), None
        pipe.send(answer)


# ---------------------------------------------------------------- problems: the same on every rank, each takes its part


def problem(tokens, num_experts=10, k=3, width=32, inner=48, activation="relu2", dtype=torch.float32, form="dense"):
    """The whole of a problem, with ``tokens[r]`` tokens on rank r; some slots are skipped, with a weight of NaN."""
    g, total = torch.Generator().manual_seed(sum(tokens) + 1), sum(tokens)
    rows = inner * (1 if activation == "relu2" else 2)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    p = SimpleNamespace(tokens=list(tokens), activation=activation, num_experts=num_experts)
    p.z = normal(total, width).to(dtype)
    p.ids = torch.randint(-1, num_experts + 1, (total, k), generator=g).int()
    p.weights = normal(total, k)
    p.weights[(p.ids < 0) | (p.ids == num_experts)] = float("nan")
    if form == "nvfp4":
        torch.manual_seed(1)
        p.w_up, p.w_down = nvfp4(num_experts, rows, width), nvfp4(num_experts, width, inner)
    else:
        p.w_up = (normal(num_experts, rows, width) * width**-0.5).to(dtype)
        p.w_down = (normal(num_experts, width, inner) * inner**-0.5).to(dtype)
    return p


def mine(p, group):
    """This rank's slice of the tokens."""
    rank = dist.get_rank(group)
    return slice(sum(p.tokens[:rank]), sum(p.tokens[: rank + 1]))


def call(ep, p, part, **options):
    shards = ep.shard(p.w_up), ep.shard(p.w_down)
    return ep(p.z[part], p.ids[part], p.weights[part], *shards, activation=p.activation, **options)


def unsharded(p):
    return experts(p.z, p.w_up, p.w_down, p.ids, p.weights, activation=p.activation)


def definition(p):
    """In float64."""
    wide = {n: getattr(p, n).double() for n in ("z", "weights", "w_up", "w_down") if not hasattr(getattr(p, n), "q")}
    return unsharded(SimpleNamespace(**{**vars(p), **wide}))


def invariant(p):
    """Whether a row of the unsharded operator has the bits of its slots: not where it may depend on the batch, in the
    reference."""
    args = (p.z, p.w_up, p.w_down, p.ids, p.weights)
    return not isinstance(p.w_up, torch.Tensor) or _dispatch.serving("moe_experts", *args) == "cpu"


def rel_l2(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


# ---------------------------------------------------------------- work: results


def agrees(group, plan, tokens, **options):
    """The rows of the unsharded operator: bit for bit if exact, within float32's or the dtype's rounding if not."""
    p = problem(tokens, **options)
    ep, part = ExpertParallel(p.num_experts, group, **plan), mine(p, group)
    y, again, whole = call(ep, p, part), call(ep, p, part), unsharded(p)[part]
    assert y.dtype == p.z.dtype and y.shape == whole.shape and y.is_contiguous()
    assert rel_l2(y, definition(p)[part]) <= (1e-6 if y.dtype == torch.float32 else 3e-3)
    if ep.combine == "exact" and invariant(p):
        assert_same_bits(y, whole)
    if ep.combine != "fast":
        assert_same_bits(y, again)


def traffic_is_planned(group, plan, tokens, **options):
    p = problem(tokens, **options)
    ep, part = ExpertParallel(p.num_experts, group, **plan), mine(p, group)
    call(ep, p, part)
    ids = p.ids.split(p.tokens)
    names = ("mode", "combine", "splits", "capacity")
    planned = plan_traffic(ids, p.num_experts, p.z.shape[1], p.z.dtype, **{n: plan[n] for n in names if n in plan})
    seen = ep.last_traffic
    for name in ("tokens", "rows", "dispatched", "combined"):
        assert getattr(seen, name) == getattr(planned[ep.rank], name), name
    assert seen.control == (ep.world_size - 1) * 8 * (16 + 2 * ep.world_size)


def static_shapes(group, mode, tokens):
    """With a capacity: the bits of the call without one, with headers or not."""
    p = problem(tokens)
    part, room = mine(p, group), max(tokens)
    y = call(ExpertParallel(p.num_experts, group, mode=mode), p, part)
    ep = ExpertParallel(p.num_experts, group, mode=mode, capacity=room)
    assert_same_bits(call(ep, p, part), y)
    ep.validate = False
    assert_same_bits(call(ep, p, part), y)
    assert ep.last_traffic.control == 0
    valid = torch.tensor([1], dtype=torch.int32)
    assert_same_bits(call(ep, p, part, valid_tokens=valid)[:1], y[:1])
    assert not call(ep, p, part, valid_tokens=valid)[1:].any()


def beyond_capacity(group):
    """3 tokens for one rank and room for 2: the third is NaN, or everybody raises."""
    p = problem([3] * dist.get_world_size(group))
    p.ids[:], p.weights[:] = 0, 1.0
    p.ids[1::3] = p.num_experts - 1
    p.ids[2::3, 1] = p.num_experts - 1
    ep, part = ExpertParallel(p.num_experts, group, mode="all_to_all", capacity=1, validate=False), mine(p, group)
    y, truth = call(ep, p, part), unsharded(p)[part]
    assert y[2].isnan().all()  # its rank was taken by the first and by the second
    assert rel_l2(y[:2], truth[:2]) <= 1e-6
    ep.validate = True
    return failure(lambda: call(ep, p, part))


def replicas(group, mode, combine):
    """Expert 0 on three ranks' worth of places, expert 3 on two: the unsharded result, wherever tokens stand."""
    p = problem([5, 4, 0, 6], num_experts=6, form="nvfp4")
    table = torch.tensor([[6, 0, 9], [1, -1, -1], [2, -1, -1], [8, 3, -1], [4, -1, -1], [5, -1, -1]], dtype=torch.int32)
    options = {"mode": mode, "combine": combine, "expert_map": table, "splits": [3, 3, 0, 4]}
    ep, part = ExpertParallel(6, group, **options), mine(p, group)
    assert ep.local_experts == [[0, 1, 2], [3, 4, 5], [], [0, 0, 3, 0]][ep.rank]  # the place 7 is spare
    y, truth = call(ep, p, part), unsharded(p)[part]
    assert rel_l2(y, truth) <= 1e-6
    turned = SimpleNamespace(**{**vars(p), "z": p.z.flip(0), "ids": p.ids.flip(0), "weights": p.weights.flip(0),
                                "tokens": p.tokens[::-1]})  # fmt: skip
    again = call(ep, turned, mine(turned, group))
    return y.tolist(), again.tolist()


def rows_are_alone(group, mode):
    """A row's bits with other tokens beside it, one of them NaN, and without."""
    p = problem([4] * dist.get_world_size(group), form="nvfp4")
    ep, part = ExpertParallel(p.num_experts, group, mode=mode), mine(p, group)
    y = call(ep, p, part)
    p.z[3::4] = float("nan")
    assert_same_bits(call(ep, p, part)[:3], y[:3])
    p.z, p.ids, p.weights = (t[1::4] for t in (p.z, p.ids, p.weights))
    p.tokens = [1] * len(p.tokens)
    assert_same_bits(call(ep, p, mine(p, group)), y[1:2])


# ---------------------------------------------------------------- work: gradients


def _leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def gradients(group, plan, tokens, frozen=(), **options):
    """Those of the unsharded operator, on ranks that hold no expert or want none, too; the same bits when repeated."""
    p = problem(tokens, **options)
    p.weights = p.weights.nan_to_num()
    ep, part = ExpertParallel(p.num_experts, group, **plan), mine(p, group)
    grad = torch.randn(p.z.shape, generator=torch.Generator().manual_seed(3))
    whole = _leaves(p.z, p.weights, p.w_up, p.w_down)
    y = experts(whole[0], *whole[2:], p.ids, whole[1], activation=p.activation)
    wanted = torch.autograd.grad(y, whole, grad)
    wanted = (wanted[0][part], wanted[1][part], ep.shard(wanted[2]), ep.shard(wanted[3]))
    leaves = _leaves(p.z[part], p.weights[part], ep.shard(p.w_up), ep.shard(p.w_down))
    for i, t in enumerate(leaves):
        t.requires_grad_((ep.rank, i) not in frozen)
    seen = []
    for _ in range(2):
        z, weights, *shards = leaves
        y = ep(z, p.ids[part], weights, *shards, activation=p.activation)
        assert y.requires_grad  # on every rank
        y.backward(grad[part])
        assert ep.last_traffic.backward > 0
        seen.append([t.grad for t in leaves])
        for t in leaves:
            t.grad = None
    for i, (a, b, truth) in enumerate(zip(*seen, wanted, strict=True)):
        if (ep.rank, i) in frozen:
            assert a is None
            continue
        assert_same_bits(a, b)
        assert a.shape == truth.shape and rel_l2(a, truth) <= 1e-5, i


def gradients_stop_at_nvfp4(group):
    p = problem([3] * dist.get_world_size(group), form="nvfp4")
    ep, part = ExpertParallel(p.num_experts, group), mine(p, group)
    p.z.requires_grad_()
    y = call(ep, p, part)
    return failure(lambda: y.sum().backward())


# ---------------------------------------------------------------- work: the layer


def _layer(p, group, dtype, latent=True):
    g, d, width = torch.Generator().manual_seed(9), 40, p.z.shape[1]

    def weight(*shape):
        return (torch.randn(*shape, generator=g) * shape[-1] ** -0.5).to(dtype)

    d = d if latent else width
    p.x = torch.randn(sum(p.tokens), d, generator=g).to(dtype)
    p.router = weight(p.num_experts, d), 0.1 * torch.randn(p.num_experts, generator=g)
    p.shared = weight(56 if p.activation == "relu2" else 112, d), weight(d, 56)
    p.latent = (weight(width, d), weight(d, width), 1 + weight(width)) if latent else ()
    p.routing = {"top_k": 3, "n_group": 2, "topk_group": 1, "scale": 2.5, "activation": p.activation}
    return p


def layer(group, combine, dtype, latent=True, form="dense", activation="relu2"):
    p = problem([4, 3, 0, 6][: dist.get_world_size(group)], dtype=dtype, form=form, activation=activation)
    _layer(p, group, dtype, latent)
    ep, part = ExpertParallel(p.num_experts, group, combine=combine), mine(p, group)
    whole = latent_moe(p.x[part], *p.router, p.w_up, p.w_down, *p.shared, *p.latent, **p.routing)
    shards = ep.shard(p.w_up), ep.shard(p.w_down)
    y = ep.latent_moe(p.x[part], *p.router, *shards, *p.shared, *p.latent, **p.routing)
    assert y.shape == whole.shape and y.dtype == dtype
    if combine == "exact" and invariant(p):
        assert_same_bits(y, whole)
    assert rel_l2(y, whole) <= (1e-6 if dtype == torch.float32 else 6e-3)  # one rounding more before fc2 in 16 bits


def layer_gradients(group):
    p = _layer(problem([4, 3]), group, torch.float32)
    ep, part = ExpertParallel(p.num_experts, group, mode="all_to_all"), mine(p, group)
    x, router, bias, shared_up, shared_down, fc1, fc2, norm = (
        t.detach().requires_grad_() for t in (p.x[part], *p.router, *p.shared, *p.latent)
    )
    w_up, w_down = _leaves(ep.shard(p.w_up), ep.shard(p.w_down))
    bias = bias.detach()
    grad = torch.randn(p.x.shape, generator=torch.Generator().manual_seed(3))
    rest = shared_up, shared_down, fc1, fc2, norm
    y = ep.latent_moe(x, router, bias, w_up, w_down, *rest, **p.routing)
    seen = torch.autograd.grad(y, (x, w_up, w_down, router, *rest), grad[part])
    xs, ups, downs = _leaves(p.x, p.w_up, p.w_down)
    y = latent_moe(xs, router, bias, ups, downs, *rest, **p.routing)
    wanted = torch.autograd.grad(y, (xs, ups, downs, router, *rest), grad)
    wanted = wanted[0][part], *map(ep.shard, wanted[1:3]), *wanted[3:]
    for i, (a, b) in enumerate(zip(seen, wanted, strict=True)):
        if i >= 3:  # weights that every rank has: their gradients add up
            a = a.clone()
            dist.all_reduce(a, group=group)
        assert rel_l2(a, b) <= 1e-5, i


# ---------------------------------------------------------------- work: failure


def failure(work):
    """The message of the RuntimeError that ``work`` raises, and how long that took."""
    start = time.monotonic()
    try:
        work()
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "it did not raise", 0.0


def bad_call(group, at, change):
    """Rank ``at`` calls with something else than it should; afterwards all can call again."""
    p = problem([3] * dist.get_world_size(group))
    ep, part = ExpertParallel(p.num_experts, group), mine(p, group)
    other = dist.get_rank(group) == at
    args = {"z": p.z[part], "ids": p.ids[part], "weights": p.weights[part], "w_up": ep.shard(p.w_up),
            "w_down": ep.shard(p.w_down), "activation": "relu2"}  # fmt: skip
    bad = BAD_CALLS[change](args) if other else {}
    message, _ = failure(lambda: ep(**{**args, **bad}))
    assert rel_l2(ep(**args), unsharded(p)[part]) <= 1e-6
    return message


BAD_CALLS = {
    "ids": lambda a: {"ids": a["ids"].long()},
    "rows": lambda a: {"weights": a["weights"][1:]},
    "experts": lambda a: {"w_up": a["w_up"][1:]},
    "stack": lambda a: {"w_down": a["w_down"][:, 1:]},
    "nothing": lambda a: {"z": None},
    "activation": lambda a: {"activation": "tanh"},
    "dtype": lambda a: {n: a[n].bfloat16() for n in ("z", "w_up", "w_down")},
    "width": lambda a: {"z": a["z"][:, :16], "w_up": a["w_up"][:, :, :16], "w_down": a["w_down"][:, :16]},
    "inner": lambda a: {"w_up": a["w_up"][:, :16], "w_down": a["w_down"][:, :, :16]},
    "columns": lambda a: {"ids": a["ids"][:, :2], "weights": a["weights"][:, :2]},
    "function": lambda a: {"w_down": a["w_down"][:, :, :24], "activation": "silu"},
}


def other_plan(group, plans):
    p = problem([3] * dist.get_world_size(group))
    ep, part = ExpertParallel(p.num_experts, group, **plans[dist.get_rank(group)]), mine(p, group)
    return failure(lambda: call(ep, p, part))[0]


def other_gradients(group, at):
    p = problem([3] * dist.get_world_size(group))
    ep, part = ExpertParallel(p.num_experts, group), mine(p, group)
    p.z.requires_grad_()
    with torch.no_grad() if ep.rank == at else contextlib.nullcontext():
        return failure(lambda: call(ep, p, part))[0]


def bad_layer(group, at):
    p = _layer(problem([3] * dist.get_world_size(group)), group, torch.float32)
    ep, part = ExpertParallel(p.num_experts, group), mine(p, group)
    if ep.rank == at:
        p.routing["top_k"] = 99
    shards = ep.shard(p.w_up), ep.shard(p.w_down)
    return failure(lambda: ep.latent_moe(p.x[part], *p.router, *shards, *p.shared, *p.latent, **p.routing))[0]


def one_stays_away(group, seconds):
    """Rank 1 raises before the call; the group waits so long for it and no longer."""
    short = dist.new_group([0, 1], timeout=timedelta(seconds=seconds), use_local_synchronization=True)
    p = problem([3, 3])
    ep, part = ExpertParallel(p.num_experts, short), mine(p, short)
    return failure(lambda: call(ep, p, part)) if ep.rank == 0 else None


def one_ends(group):
    """Rank 1 ends after a first call, in the middle of a second one on rank 0."""
    p = problem([3, 3])
    ep, part = ExpertParallel(p.num_experts, group), mine(p, group)
    call(ep, p, part)
    if ep.rank == 1:
        os._exit(0)
    return failure(lambda: call(ep, p, part))
