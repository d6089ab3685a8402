"""Speculative decoding of a small hybrid model, its states kept by `mtp_commit`'s counts alone, against decoding token
by token: tokens and states are those of the plain run, in any batch, order and slot. Wrong counts are caught."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from conftest import DEVICE

from n3kernels import use_backend
from n3kernels.mamba import ssm_replay_flush, ssm_replay_update, ssm_update
from n3kernels.mamba.conv1d_update import causal_conv1d_update_slots
from n3kernels.mtp import commit, sample, verify

OPS = ("mtp_commit",)
V, H, P, N, W = 23, 2, 8, 16, 4  # vocabulary; heads, their width, their state; taps
CHANNELS = H * P + 2 * N
DRAFTS = 3
T = DRAFTS + 1
RING = 2 * T + 3  # entries wrap around at another place every time
SLOTS = 6
LENGTH = 24  # tokens of each request


def like(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


class Model:
    """Embedding, a Mamba-2 mixer without gate, and a head: all that a state can go wrong in."""

    def __init__(self):
        self.embedding = like(V, CHANNELS + H, seed=1)
        self.taps, self.head = like(CHANNELS, W, scale=0.5, seed=2), like(V, H * P, scale=1.5, seed=3)
        self.A, self.D = -like(H, seed=4).abs() - 0.1, like(H, seed=5)

    def inputs(self, u: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """x, dt, B and C of convolved channels and raw dt ``[batch, tokens, ...]``."""
        x, B, C, dt = u.split([H * P, N, N, H], -1)
        return x.unflatten(-1, (H, P)), dt, B.unflatten(-1, (1, N)), C.unflatten(-1, (1, N))

    def plain(self, prompt: int, seed: int, temperature: float) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """Tokens, last inputs of the convolution and state after decoding one token at a time."""
        conv, state = like(1, CHANNELS, W - 1) * 0, like(1, H, P, N) * 0
        tokens = [prompt]
        for step in range(LENGTH):
            e = self.embedding[tokens[-1]][None]
            u = causal_conv1d_update_slots(e[:, :CHANNELS].contiguous(), conv, self.taps, activation="silu")
            x, dt, B, C = self.inputs(torch.cat([u, e[:, CHANNELS:]], -1))
            y = ssm_update(state, x, dt, self.A, B, C, self.D)
            drawn = sample(
                y.flatten(1) @ self.head.T, torch.tensor([seed], device=DEVICE), torch.tensor([step], device=DEVICE),
                temperature=torch.tensor([temperature], device=DEVICE),
            )  # fmt: skip
            tokens.append(drawn[0].item())
        return tokens, conv, state


@dataclass
class Request:
    prompt: int
    seed: int
    temperature: float
    slot: int
    truth: list[int]
    tokens: list[int] = field(default_factory=list)


class Engine:
    """The caches of an engine, one slot per request, and steps of speculative decoding over them."""

    def __init__(self, model: Model, commit):
        self.model, self.commit = model, commit
        poison = float("nan")  # of slots that no request has
        self.conv = torch.full((SLOTS, CHANNELS, W - 2 + T), poison, device=DEVICE)
        self.state = torch.full((SLOTS, H, P, N), poison, device=DEVICE)
        self.ring_x = torch.full((SLOTS, RING, H, P), poison, device=DEVICE)
        self.ring_B = torch.full((SLOTS, RING, 1, N), poison, device=DEVICE)
        self.ring_dt = torch.full((SLOTS, RING, H), poison, device=DEVICE)
        self.ring_pos, self.seq_len, self.kept = (
            torch.full(shape, value, dtype=torch.int32, device=DEVICE)
            for shape, value in (((SLOTS, 2), 0), ((SLOTS,), 0), ((SLOTS,), T))
        )
        self.seeds = torch.zeros(SLOTS, dtype=torch.int64, device=DEVICE)
        self.temperature = torch.zeros(SLOTS, device=DEVICE)

    def caches(self) -> list[torch.Tensor]:
        return [self.conv, self.state, self.ring_x, self.ring_B, self.ring_dt, self.ring_pos, self.seq_len, self.kept]

    def admit(self, r: Request) -> None:
        for cache, value in zip(self.caches(), (0, 0, 0, 0, 0, 0, 0, T), strict=True):
            cache[r.slot] = value  # an empty prompt's states; the window of the convolution holds zeros
        self.seeds[r.slot], self.temperature[r.slot] = r.seed, r.temperature
        r.tokens = [r.prompt]

    def move(self, r: Request, slot: int) -> None:
        """Preemption: a request goes on in another slot."""
        for cache in (*self.caches(), self.seeds, self.temperature):
            cache[slot] = cache[r.slot]
            if cache.is_floating_point():
                cache[r.slot] = float("nan")
        r.slot = slot

    def step(self, batch: list[Request | None], drafts: list[list[int]]) -> None:
        """One verification of k drafts for each request; None is a padding entry of the batch."""
        m, ints = self.model, {"dtype": torch.int32, "device": DEVICE}
        slot = torch.tensor([-1 if r is None else r.slot for r in batch], **ints)
        at = slot.clamp(min=0).long()
        inputs = [[0] * T if r is None else [r.tokens[-1], *d] for r, d in zip(batch, drafts, strict=True)]
        e = m.embedding[torch.tensor(inputs, device=DEVICE)]
        u = causal_conv1d_update_slots(
            e[..., :CHANNELS].contiguous(), self.conv, m.taps, None, slot, num_accepted=self.kept[at],
            activation="silu",
        )  # fmt: skip
        x, dt, B, C = m.inputs(torch.cat([u, e[..., CHANNELS:]], -1))
        y = ssm_replay_update(
            self.state, self.ring_x, self.ring_B, self.ring_dt, self.ring_pos, x, dt, m.A, B, C, m.D, None, None, slot
        )
        logits = (y.flatten(2) @ m.head.T).flatten(0, 1)
        draft_tokens = torch.tensor([[*d, -1] for d in drafts], **ints).flatten()
        cu_rows = torch.arange(0, T * len(batch) + 1, T, **ints)
        pos = torch.tensor([0 if r is None else len(r.tokens) - 1 for r in batch], device=DEVICE)
        tokens, emitted, *_ = verify(
            logits, draft_tokens, cu_rows, self.seeds, pos, mode="coupled", max_drafts=DRAFTS, slot=slot,
            temperature=self.temperature,
        )  # fmt: skip
        accepted, *_ = self.commit(
            tokens, emitted, cu_rows, self.seq_len, slot=slot, ring_pos=self.ring_pos, ring_size=RING, ring_tokens=T
        )
        for i, r in enumerate(batch):
            if r is not None:
                r.tokens += tokens[i, : accepted[i]].tolist()
                self.kept[r.slot] = accepted[i]


def run(commit) -> None:
    """Five requests, some drafts right and some wrong, a batch in changing order with padding, slots that change
    hands, until all have their tokens; asserts on the way and at the end."""
    model, choice = Model(), torch.Generator().manual_seed(8)
    engine = Engine(model, commit)
    requests, states = [], {}
    for i, temperature in enumerate((0.0, 0.8, 1.3, 0.7, 0.0)):
        truth, conv, state = model.plain(3 * i + 1, 100 + i, temperature)
        requests.append(Request(3 * i + 1, 100 + i, temperature, i, truth))
        states[id(requests[-1])] = truth, conv, state
        engine.admit(requests[-1])

    def draft(r: Request) -> list[int]:
        """The true next tokens up to a random place, and none that is right there."""
        right = torch.randint(T, (), generator=choice).item()
        after = [*r.truth[len(r.tokens) :], *[0] * T][:DRAFTS]
        return [token if i < right else (token + 1 + i) % V for i, token in enumerate(after)]

    free, finished = SLOTS - 1, []
    for turn in range(200):
        running = [r for r in requests if r not in finished]
        if not running:
            break
        order = torch.randperm(len(running), generator=choice).tolist()
        batch = [running[i] for i in order if len(running) == 1 or torch.rand((), generator=choice) < 0.8]
        batch.insert(turn % (len(batch) + 1), None)
        untouched = [s for s in range(SLOTS) if s not in [r.slot for r in batch if r]]
        before = [cache[untouched].clone() for cache in engine.caches()]
        engine.step(batch, [[0] * DRAFTS if r is None else draft(r) for r in batch])
        for cache, kept in zip(engine.caches(), before, strict=True):
            assert torch.equal(cache[untouched].nan_to_num(7.0), kept.nan_to_num(7.0)), "a slot of nobody was written"
        for r in batch:
            if r is None:
                continue
            made = min(len(r.tokens), len(r.truth))
            assert r.tokens[:made] == r.truth[:made], f"turn {turn}: {r.tokens} instead of {r.truth}"
            if len(r.tokens) > LENGTH:
                finished.append(r)
        if turn % 3 == 2 and running[0] not in finished:
            free, old = running[0].slot, free
            engine.move(running[0], old)
    assert len(finished) == len(requests)
    for r in requests:
        compare_states(engine, model, r)


def compare_states(engine: Engine, model: Model, r: Request) -> None:
    """What the slot holds is the plain run's state after the same inputs: all tokens but the last."""
    conv, state = like(1, CHANNELS, W - 1) * 0, like(1, H, P, N) * 0
    for token in r.tokens[:-1]:
        e = model.embedding[token][None]
        u = causal_conv1d_update_slots(e[:, :CHANNELS].contiguous(), conv, model.taps, activation="silu")
        x, dt, B, C = model.inputs(torch.cat([u, e[:, CHANNELS:]], -1))
        ssm_update(state, x, dt, model.A, B, C, model.D)
    at = torch.tensor([r.slot], dtype=torch.int32, device=DEVICE)
    ssm_replay_flush(engine.state, engine.ring_pos, engine.ring_x, engine.ring_B, engine.ring_dt, model.A, at)
    torch.testing.assert_close(engine.state[r.slot], state[0], rtol=1e-4, atol=1e-5)
    kept = engine.kept[r.slot].item()
    assert torch.equal(engine.conv[r.slot][:, kept - 1 : kept + W - 2], conv[0]), "the convolution's inputs"
    assert engine.seq_len[r.slot].item() == len(r.tokens) - 1


def test_states_are_those_of_plain_decoding(backend, monkeypatch):
    if backend == "triton" and DEVICE == "cpu":  # the interpreter takes a second per step
        monkeypatch.setitem(globals(), "LENGTH", 6)
    run(commit)


def _drafts_only(tokens, emitted, *args, **kwargs):
    """tau instead of tau + 1."""
    return commit(tokens, (emitted - 1).clamp(min=0), *args, **kwargs)


def _all_drafts(tokens, emitted, *args, **kwargs):
    """The length of the query instead of what was accepted of it."""
    return commit(tokens, torch.where(emitted > 0, T, 0).int(), *args, **kwargs)


def _stale_order(tokens, emitted, cu_rows, seq_len, *, slot, **kwargs):
    """Counts in the order of another batch."""
    return commit(tokens, emitted.flip(0), cu_rows, seq_len, slot=slot.flip(0), **kwargs)


def _ring_one_short(tokens, emitted, cu_rows, seq_len, *, ring_pos, **kwargs):
    """tau instead of tau + 1 in the ring alone."""
    out = commit(tokens, emitted, cu_rows, seq_len, **{k: v for k, v in kwargs.items() if "ring" not in k})
    commit(
        tokens, (emitted - 1).clamp(min=0), cu_rows, seq_len.clone(), slot=kwargs["slot"], ring_pos=ring_pos,
        ring_size=RING, ring_tokens=T,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("wrong", [_drafts_only, _all_drafts, _stale_order, _ring_one_short])
def test_wrong_counts_are_caught(wrong):
    with use_backend("reference"), pytest.raises((AssertionError, RuntimeError)):
        run(wrong)
