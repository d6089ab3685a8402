from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import Check
from ..moe import reference, reference_layer
from ..moe.experts import unpack
from .checks import check_call, check_layer, checked_map
from .collectives import Comm
from .headers import DTYPES, INPUTS, WEIGHTS, Header, Headers
from .plan import COMBINES, MODES, Traffic, bounds_of, owners, replicate, resolve_mode, tally
from .routes import AllToAll, Gather, Padded, Route

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from ..nvfp4 import NVFP4Tensor

__all__ = ["ExpertParallel"]

_T = TypeVar("_T")


class _Call(NamedTuple):
    """One rank's checked arguments; ids are physical experts, -1 or their number where nobody has them."""

    z: Tensor
    ids: Tensor
    weights: Tensor
    w_up: Tensor
    w_down: Tensor
    scales: tuple[Tensor | None, ...]
    activation: str
    owner: Tensor | None  # rank of each slot; None where all tokens go to all ranks
    counts: Tensor | None  # slots of each token on each rank


class ExpertParallel:
    r"""Routed experts spread over the ranks of a process group: ``y = experts(z, W_up, W_down, ids, weights)``.

    Every rank calls it with its own tokens and its own experts and gets the rows of its own tokens. The object holds
    the plan and the group, no weights. Ranks are those of the group; the experts of a rank are contiguous.

    Modes. ``"gather"``: every rank receives all tokens (all-gather), computes its experts for them and returns a row
    for each; shapes do not depend on the routing. ``"all_to_all"``: a token's row goes once to each rank that holds at
    least one of its experts, with those ids and weights alone, and one row comes back for each (token, rank).
    ``"auto"`` gathers up to 8 ranks, or with ``combine="fast"``.

    Combine. ``"ordered"``: partial sums in the dtype of ``z`` come back and are added in float32 in ascending rank,
    rounded once: deterministic. In float32 that is within 1e-6 of the unsharded operator, in 16 bits every partial sum
    is one more rounding. ``"fast"``: a reduce-scatter in float32, in an order that is not promised. ``"exact"``: one
    float32 row for each slot comes back, and the sum is that of the unsharded operator, slot by slot: on the CPU equal
    to it bit for bit. It sends ``k`` rows for a token: for tests.

    Headers. Ranks first exchange a header (shapes, dtypes, options, and how many rows go where). A bad argument on one
    rank, or ranks that differ, raise the same `RuntimeError` on every rank. The header costs one all-gather of
    ``8 * (16 + 2 * ranks)`` bytes and makes the host wait. Without ``capacity`` the sizes of the payload have to be
    known, so it is always sent; with ``capacity`` shapes are static, and ``validate = False`` leaves it out, as a CUDA
    graph needs. Then ranks that differ hang until the group's timeout or compute nonsense: validate a first call.

    Gradients reach ``z``, ``weights`` and dense ``w_up``, ``w_down`` by the adjoint collectives, always in the ordered
    sum. Every rank takes part as soon as one wants gradients, so every rank must run its backward pass; without
    headers each rank has to want the same.

    Args:
        num_experts: E, experts of the router, which is what ``ids`` count.
        group: the `ProcessGroup`, gloo or NCCL; None is the default group.
        mode: ``"auto"``, ``"gather"`` or ``"all_to_all"``.
        combine: ``"ordered"``, ``"fast"`` (gather only) or ``"exact"``.
        splits: how many experts each rank holds, zero included; None: as equal as can be, the first ranks one more.
        expert_map: ``[E]`` or ``[E, R]``, int32: the physical experts that hold each expert, filled up with -1;
            ``splits`` then counts physical experts. Each token takes the replica that a hash of its row in ``z``
            chooses, wherever it stands.
        capacity: rows that one rank may send to another; the payload is always so large. A rank must not have more
            tokens with ``"gather"``; with ``"all_to_all"`` a token beyond it raises if ``validate``, else its row of
            the result is NaN. As many as tokens is always enough. None: as many as there are.
        validate: exchange headers where they could be left out. It may be set later.
    Raises:
        RuntimeError: no process group, or an argument outside the above; the message names argument and values.
    Source: DeepEP's dispatch and combine; LatentMoE (arXiv:2601.18089), whose latent rows are what travels.

    >>> import torch.distributed as dist
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> ep = ExpertParallel(4)
    >>> z, w_up, w_down = torch.randn(3, 8), torch.randn(4, 16, 8), torch.randn(4, 8, 16)
    >>> ids = torch.tensor([[0, 3], [1, -1], [2, 0]], dtype=torch.int32)
    >>> ep(z, ids, torch.ones(3, 2), ep.shard(w_up), ep.shard(w_down)).shape
    torch.Size([3, 8])
    >>> ep.last_traffic.dispatched  # one rank sends nothing
    0
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        num_experts: int,
        group: ProcessGroup | None = None,
        *,
        mode: str = "auto",
        combine: str = "ordered",
        splits: Sequence[int] | None = None,
        expert_map: Tensor | None = None,
        capacity: int | None = None,
        validate: bool = True,
    ):
        check = self._words = Check("expert_parallel")
        ready = dist.is_available() and dist.is_initialized()
        check.that(ready, "group must be given, or torch.distributed.init_process_group() called before")
        check.that(dist.get_rank(group) >= 0, "group must contain the calling process")
        check.that(num_experts >= 1, "num_experts must be at least 1", num_experts)
        self._comm = Comm(group)
        self.rank, self.world_size = self._comm.rank, self._comm.size
        self.num_experts, self.combine, self.capacity, self.validate = num_experts, combine, capacity, validate
        self.mode = resolve_mode(check, mode, combine, capacity, self.world_size)
        self._map = None if expert_map is None else checked_map(check, expert_map, num_experts)
        physical = num_experts
        if self._map is not None:
            physical = int(self._map.max()) + 1 if splits is None else sum(splits)
            check.that(int(self._map.max()) < physical, f"expert_map must be below the {physical} experts of splits",
                       lambda: int(self._map.max()))  # fmt: skip
        self.bounds = bounds_of(check, physical, self.world_size, splits)
        self._on_device: dict[torch.device, tuple[Tensor, Tensor | None]] = {}
        of_map = 0 if self._map is None else zlib.crc32(str(self._map_rows()).encode())
        agreed = MODES.index(self.mode), COMBINES.index(combine), capacity or 0, num_experts
        self._headers = Headers(self._comm, check, (*agreed, zlib.crc32(str(self.bounds).encode()), of_map))
        self.last_traffic = Traffic(0)

    @property
    def first_expert(self) -> int:
        """The first physical expert of this rank."""
        return self.bounds[self.rank]

    @property
    def num_local_experts(self) -> int:
        return self.bounds[self.rank + 1] - self.bounds[self.rank]

    @property
    def local_experts(self) -> list[int]:
        """The router's experts that this rank holds, in the order of its weights."""
        local = range(self.bounds[self.rank], self.bounds[self.rank + 1])
        if self._map is None:
            return list(local)
        holds = {p: e for e, row in enumerate(self._map_rows()) for p in row if p >= 0}
        return [holds.get(p, 0) for p in local]  # a spare one may hold anything

    def shard(self, w: Tensor | NVFP4Tensor) -> Tensor | NVFP4Tensor:
        """This rank's experts of a stack ``[E, ...]`` of all, dense or NVFP4; a view where the experts are one range.

        Args:
            w: the weights of the router's experts, the first dimension E.
        Returns:
            ``[experts of this rank, ...]``.
        """
        if not isinstance(w, Tensor):
            q, block_scale, global_scale = unpack(w)
            scale = self.shard(block_scale.view(torch.uint8)).view(block_scale.dtype)  # float8 has no indexing
            return type(w).from_parts(self.shard(q), scale, self.shard(global_scale))
        self._words.that(w.shape[0] == self.num_experts, f"w must have {self.num_experts} experts", w.shape[0])
        if self._map is None:
            return w[self.bounds[self.rank] : self.bounds[self.rank + 1]]
        return w[torch.tensor(self.local_experts, dtype=torch.int64, device=w.device)]

    # ------------------------------------------------------------ calls

    @torch.compiler.disable
    def __call__(
        self,
        z: Tensor,
        ids: Tensor,
        weights: Tensor,
        w_up: Tensor | NVFP4Tensor,
        w_down: Tensor | NVFP4Tensor,
        *,
        activation: str = "relu2",
        valid_tokens: Tensor | None = None,
    ) -> Tensor:
        r"""Returns ``y[t] = sum_j weights[t, j] * W_down[e] act(W_up[e] z[t])``, ``e = ids[t, j]`` on whatever rank.

        Args:
            z: ``[T, l]``, this rank's tokens, T zero or more and different from rank to rank; float32, float16,
                bfloat16 (or float64, by the reference alone).
            ids: ``[T, k]``, int32, the router's experts. Outside ``0 .. E - 1``, such as -1: skipped.
            weights: ``[T, k]``, float32 (float64 for float64 ``z``); they travel as they are.
            w_up, w_down: this rank's experts, ``[E_local, I, l]`` and ``[E_local, l, I]``; see `n3kernels.moe.experts`.
            activation: ``"relu2"``, ``"silu"`` or ``"gelu"``; see `n3kernels.moe.experts`.
            valid_tokens: ``[1]``, int32: rows from this one on are padding, sent nowhere by ``"all_to_all"``, and come
                out as zeros.
        Returns:
            ``[T, l]``, dtype of ``z``, contiguous: see ``combine``. ``last_traffic`` says how many bytes were sent.
        Raises:
            RuntimeError: a bad argument on any rank, ranks that differ, or a rank that does not take part; the message
                says which rank, and names argument and values.
        """
        self._comm.take_sent()  # what a call that failed left
        call = self._together(lambda: self._prepare(z, ids, weights, w_up, w_down, activation, valid_tokens))
        wants, route = self._meet(call)
        self.last_traffic = traffic = Traffic(len(call.z), route.rows_sent, control=self._comm.take_sent())
        tensors = call.z, call.weights, call.w_up, call.w_down
        if wants:
            anchor = torch.empty(0, requires_grad=True)  # a graph also on a rank that wants no gradient itself
            return _Function.apply(*tensors, anchor, self, call, route, traffic, wants)
        return self._forward(*tensors, call, route, traffic)[0]

    @torch.compiler.disable
    def latent_moe(
        self,
        x: Tensor,
        router_weight: Tensor,
        router_bias: Tensor | None,
        w_up: Tensor | NVFP4Tensor,
        w_down: Tensor | NVFP4Tensor,
        shared_up: Tensor | NVFP4Tensor,
        shared_down: Tensor | NVFP4Tensor,
        fc1: Tensor | None = None,
        fc2: Tensor | None = None,
        latent_norm: Tensor | None = None,
        *,
        top_k: int,
        n_group: int = 1,
        topk_group: int = 1,
        normalize: bool = True,
        scale: float = 1.0,
        activation: str = "relu2",
        norm_eps: float = 1e-5,
    ) -> Tensor:
        r"""Returns ``fc2(norm(experts(fc1(x), route(x)))) + shared_down(act(shared_up(x)))``: one layer, experts apart.

        Router, latent projections and shared expert are whole on every rank and work on the rank's own tokens; what
        travels is the latent width.

        Args:
            x: ``[..., d]``, this rank's tokens.
            w_up, w_down: this rank's routed experts, ``[E_local, I, l]`` and ``[E_local, l, I]``.
            router_weight, router_bias, shared_up, shared_down, fc1, fc2, latent_norm: whole, as
                `n3kernels.moe.latent_moe` takes them.
            top_k, n_group, topk_group, normalize, scale, activation, norm_eps: see `n3kernels.moe.latent_moe`.
        Returns:
            ``[..., d]``, dtype of ``x``, contiguous: `n3kernels.moe.latent_moe` but for the sum over ranks, see
            ``combine``; ``"exact"`` is that layer bit for bit on the CPU.
        Raises:
            RuntimeError: as a call.
        """
        routing = {"n_group": n_group, "topk_group": topk_group, "normalize": normalize, "scale": scale}

        def front() -> tuple[Tensor, ...]:
            up, down = unpack(shared_up), unpack(shared_down)
            check_layer(
                self._words, (x, router_weight, router_bias), w_up, w_down, (up, down), (fc1, fc2, latent_norm),
                experts=self.num_experts, local=self.num_local_experts, top_k=top_k, activation=activation,
                norm_eps=norm_eps, **routing,
            )  # fmt: skip
            tokens = x.flatten(0, -2)
            with torch.autocast(x.device.type, enabled=False):  # as the layer on one rank
                logits, z, shared = reference_layer._front(tokens, router_weight, fc1, *up, activation)
                bias = None if router_bias is None else router_bias.to(torch.promote_types(x.dtype, torch.float32))
                ids, weights, _, _ = torch.ops.n3.moe_route(logits, bias, top_k=top_k, **routing)
            return z, ids, weights, shared

        z, ids, weights, shared = self._together(front)
        y = self(z, ids, weights, w_up, w_down, activation=activation)
        with torch.autocast(x.device.type, enabled=False):
            if latent_norm is not None:
                y = torch.ops.n3.gated_rms_norm(y, None, latent_norm, y.shape[1], norm_eps)
            return reference_layer._tail(y, fc2, shared, *unpack(shared_down)).view(x.shape)

    # ------------------------------------------------------------ what a call consists of

    def _prepare(self, z, ids, weights, w_up, w_down, activation, valid_tokens) -> _Call:
        w_up, *up = unpack(w_up)
        w_down, *down = unpack(w_down)
        scales = (*up, *down)
        check_call(
            self._words, z, ids, weights, w_up, w_down, scales, activation, valid_tokens, local=self.num_local_experts
        )
        if self.mode == "gather" and self.capacity is not None:
            self._words.that(len(z) <= self.capacity, f"capacity must be at least the {len(z)} tokens", self.capacity)
        ends, expert_map = self._tables(z.device)
        ids = reference.valid_ids(ids, valid_tokens)
        if expert_map is not None:
            ids = replicate(ids, expert_map, z)
        ids = ids.clamp(-1, self.bounds[-1])
        owner = counts = None
        if self.mode == "all_to_all" or self.combine == "exact":
            owner = owners(ids, ends)
            counts = tally(owner, self.world_size)
        call = _Call(z, ids, weights, w_up, w_down, scales, activation, owner, counts)
        if self.mode == "all_to_all" and self.capacity is not None and not self._silent:
            most = int((call.counts > 0).sum(0).max())
            self._words.that(most <= self.capacity, f"capacity must be at least the {most} rows for one rank",
                             self.capacity)  # fmt: skip
        return call

    @property
    def _silent(self) -> bool:
        """Whether calls go without headers."""
        return self.capacity is not None and not self.validate

    def _together(self, work: Callable[[], _T]) -> _T:
        return work() if self._silent else self._headers.together(work)

    def _meet(self, call: _Call) -> tuple[int, Route]:
        """Exchanges the headers; returns who wants gradients, and the way of the rows."""
        wants = 0
        if torch.is_grad_enabled():
            wants |= INPUTS * (call.z.requires_grad or call.weights.requires_grad)
            wants |= WEIGHTS * (call.w_up.requires_grad or call.w_down.requires_grad)
        headers = []
        if not self._silent:
            rows = slots = [0] * self.world_size
            if call.counts is not None:
                rows, slots = (call.counts > 0).sum(0).tolist(), call.counts.sum(0).tolist()
            mine = Header(torch.is_grad_enabled(), wants, len(call.z), rows, slots)
            headers = self._headers.exchange(_agreed(call), mine)
            for header in headers:
                wants |= header.wants
        plan = self._comm, call.ids, self.bounds[-1]
        if self.mode == "gather":
            route = Gather(*plan, self.capacity or max(header.tokens for header in headers))
        elif self.capacity is not None:
            return wants, Padded(*plan, call.counts, self.capacity)
        else:
            route = AllToAll(*plan, call.counts, [header.rows for header in headers])
        if call.owner is not None:
            route.know_slots(call.owner, [header.slots for header in headers])
        return wants, route

    def _forward(self, z, weights, w_up, w_down, call: _Call, route: Route, traffic: Traffic) -> tuple[Tensor, ...]:
        """The result, and what the experts got, for the backward pass."""
        comm = self._comm
        inbox = route.dispatch(z, call.ids, weights)
        traffic.dispatched = comm.take_sent()
        x, ids, gains = inbox
        if self.combine == "exact":
            y = route.collect_slots(self._slots(x, ids, w_up, w_down, call), weights).to(z.dtype)
        else:
            y = self._experts(x, ids, gains, w_up, w_down, call)
            y = route.collect(y, fast=self.combine == "fast")
        traffic.combined = comm.take_sent()
        return y, *inbox

    def _experts(self, x, ids, weights, w_up, w_down, call: _Call, out_dtype: torch.dtype | None = None) -> Tensor:
        if self.num_local_experts == 0:
            return torch.zeros_like(x, dtype=out_dtype)
        return torch.ops.n3.moe_experts.default(
            x, w_up, w_down, ids, weights, *call.scales, activation=call.activation, first_expert=self.first_expert,
            out_dtype=out_dtype,
        )  # fmt: skip

    def _slots(self, x, ids, w_up, w_down, call: _Call) -> Tensor:
        """The float32 row of each local slot, without its weight."""
        wide = torch.promote_types(x.dtype, torch.float32)
        row, column = ((ids >= self.first_expert) & (ids < self.bounds[self.rank + 1])).nonzero(as_tuple=True)
        one = torch.ones(len(row), 1, dtype=wide, device=x.device)
        return self._experts(x[row], ids[row, column][:, None], one, w_up, w_down, call, wide)

    def _backward(self, dy, x, ids, gains, w_up, w_down, call: _Call, route: Route, traffic: Traffic, wants: int):
        self._words.that(call.scales[0] is None, "w_up must be dense, got NVFP4: decode it first to train through it")
        self._comm.take_sent()
        dy = route.spread(dy.contiguous())
        if self.num_local_experts:
            dx, dw_up, dw_down, dgains = torch.ops.n3.moe_experts_bwd.default(
                dy, x, w_up, w_down, ids, gains, call.activation, self.first_expert
            )
        else:
            dx, dw_up, dw_down, dgains = (torch.zeros_like(t) for t in (x, w_up, w_down, gains))
        dz = dweights = None
        if wants & INPUTS:
            dz, dweights = route.collect_grads(dx, dgains)
        traffic.backward += self._comm.take_sent()
        return dz, dweights, dw_up, dw_down

    # ------------------------------------------------------------ tables

    def _map_rows(self) -> list[list[int]] | None:
        return None if self._map is None else self._map.tolist()

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Where the experts of each rank end, and the map, on the device of a call."""
        if device not in self._on_device:
            ends = torch.tensor(self.bounds[1:], dtype=torch.int32, device=device)
            self._on_device[device] = ends, None if self._map is None else self._map.to(device)
        return self._on_device[device]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, weights, w_up, w_down, anchor, ep, call, route, traffic, wants):
        y, *inbox = ep._forward(z, weights, w_up, w_down, call, route, traffic)
        ctx.save_for_backward(*inbox, w_up, w_down)
        # Without its inputs: they are saved above, and would keep their graphs alive.
        ctx.ep, ctx.rest = ep, (call._replace(z=None, weights=None, w_up=None, w_down=None), route, traffic, wants)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        grads = ctx.ep._backward(dy, *ctx.saved_tensors, *ctx.rest)
        needed = (g if need else None for g, need in zip(grads, ctx.needs_input_grad[:4], strict=True))
        return *needed, None, None, None, None, None, None


def _agreed(call: _Call) -> list[int]:
    """What a call has to have in common with those of the other ranks."""
    packed = call.scales[0] is not None
    return [
        call.z.shape[1], DTYPES.index(call.z.dtype), call.ids.shape[1], call.w_down.shape[2] * (2 if packed else 1),
        int(packed), reference.ACTIVATIONS.index(call.activation),
    ]  # fmt: skip
