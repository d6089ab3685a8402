from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st

from n3kernels import _philox
from n3kernels.mtp import reference, sample

OPS = ("sample",)
TILE, INF, NAN = reference.TILE, math.inf, math.nan
WIDE = 2 * TILE + 37  # three tiles, the last one ragged

INT, FLOAT, LONG = torch.int32, torch.float32, torch.int64


def tensor(values, dtype) -> torch.Tensor:
    return fenced(torch.tensor(values, dtype=dtype, device=DEVICE))


def params(n: int, **values) -> dict[str, torch.Tensor]:
    """One value of each parameter for every slot, or a list of one per slot."""
    dtypes = {"temperature": FLOAT, "top_k": INT, "top_p": FLOAT, "min_p": FLOAT}
    return {
        name: tensor(value if isinstance(value, list) else [value] * n, dtypes[name])
        for name, value in values.items()
        if value is not None
    }


def keys(n: int, seed: int = 0, pos: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return tensor([seed + i for i in range(n)], LONG), tensor([pos + 7 * i for i in range(n)], LONG)


def bits(rows: list[list[int]], vocab: int) -> torch.Tensor:
    """Bitmask that allows the listed tokens, one list per row; bits past the vocabulary are set."""
    words = (vocab + 31) // 32
    allowed = torch.zeros(len(rows), 32 * words, dtype=LONG)
    allowed[:, vocab:] = 1
    for r, ids in enumerate(rows):
        allowed[r, ids] = 1
    packed = (allowed.view(len(rows), words, 32) << torch.arange(32)).sum(-1)
    return fenced(packed.to(INT).to(DEVICE))


def assert_drawn(logits, seed, pos, out, **options):
    """Each token wins the draw of the definition, or loses it by a rounding error; its log-probability is right.

    The rows' parameters are slot = row. A backend in float32 may settle a tie of 1e-5 otherwise: the law is the same.
    """
    tokens, logprobs, flags = (t.cpu() for t in out)
    want = sample_by_definition(logits, seed, pos, **options)
    assert torch.equal(flags, want[2].cpu())
    log_p = reference.target_logprobs(logits, **options).cpu()
    for r, token in enumerate(tokens.tolist()):
        assert 0 <= token < logits.shape[1]
        if token != want[0][r]:
            assert_nearly_wins(log_p[r], int(seed[r]), int(pos[r]), token)
        assert abs(logprobs[r] - log_p[r, token]) <= 1e-5 * (1 + abs(log_p[r, token]))


def sample_by_definition(logits, seed, pos, **options):
    return reference.sample(logits, seed, pos, **options)


def assert_nearly_wins(log_p, seed, pos, token, room=1e-4):
    tiles = torch.nn.functional.pad(log_p, (0, -len(log_p) % TILE), value=-INF).view(-1, TILE).logsumexp(1)
    tiles = tiles + _philox.gumbel(seed, pos, _philox.TILE, torch.arange(len(tiles)))
    assert tiles[token // TILE] >= tiles.max() - room
    ids = torch.arange(token // TILE * TILE, min((token // TILE + 1) * TILE, len(log_p)))
    scores = log_p[ids] + _philox.gumbel(seed, pos, _philox.TARGET, ids)
    assert scores[token % TILE] >= scores.max() - room


# ---------------------------------------------------------------- the definition against sorting


def kept_by_sorting(x: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The tokens that stay, by probabilities and sorting, one rule after the other; -inf is never kept."""
    best = max(x)
    p = {i: math.exp((v - best) / temperature) for i, v in enumerate(x) if v > -INF}
    if min_p > 0:
        p = {i: v for i, v in p.items() if v >= min(min_p, 1.0) * max(p.values())}
    if 0 < top_k < len(p):
        kth = sorted((x[i] for i in p), reverse=True)[top_k - 1]
        p = {i: v for i, v in p.items() if x[i] >= kth}
    if top_p < 1:
        total, mass, kept = sum(p.values()), 0.0, {}
        for value in sorted({x[i] for i in p}, reverse=True):
            equals = {i: v for i, v in p.items() if x[i] == value}
            kept |= equals
            mass += sum(equals.values())
            if mass >= top_p * total:
                break
        p = kept
    return set(p)


numbers = st.one_of(st.floats(-8, 8, width=16), st.sampled_from([0.0, 1.0, 2.0, -INF]))  # ties are frequent
filters = st.tuples(
    st.sampled_from([0.3, 1.0, 2.5]), st.sampled_from([0, 1, 2, 5, 1000]),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]), st.sampled_from([0.0, 0.05, 0.3, 1.0, 2.0]),
)  # fmt: skip


@given(st.lists(numbers, min_size=1, max_size=40).filter(lambda x: max(x) > -INF), filters)
def test_definition_keeps_what_sorting_keeps(x, options):
    temperature, top_k, top_p, min_p = (torch.tensor(v, dtype=FLOAT).item() for v in options)
    log_p = reference.target_logprobs(
        tensor([x], FLOAT), **params(1, temperature=temperature, top_k=int(top_k), top_p=top_p, min_p=min_p)
    )[0].cpu()
    kept = sorted(kept_by_sorting(x, temperature, int(top_k), top_p, min_p))
    assert (log_p > -INF).nonzero()[:, 0].tolist() == kept
    truth = (torch.tensor(x, dtype=torch.float64)[kept] / temperature).softmax(0)
    assert (log_p[kept].exp() - truth).abs().sum() <= 1e-12


@pytest.mark.parametrize("top_p, kept", [(0.3, 1), (0.41, 3), (0.79, 3), (0.81, 4), (1.0, 5), (0.0, 1), (-1.0, 1)])
def test_top_p_keeps_the_tie_that_crosses(top_p, kept):
    """Probabilities 0.4, 0.2, 0.2, 0.15, 0.05."""
    x = tensor([[0.2, 0.4, 0.05, 0.2, 0.15]], torch.float64).log()
    assert (reference.target_logprobs(x, **params(1, top_p=top_p)) > -INF).sum() == kept


# ---------------------------------------------------------------- every backend against the definition

problems = st.tuples(
    st.integers(0, 3), st.sampled_from([1, 2, 31, 32, 33, 1000, TILE - 1, TILE, TILE + 1, WIDE]),
    st.sampled_from([FLOAT, torch.float16, torch.bfloat16]), st.integers(0, 2**62), st.sampled_from([1.0, 4.0]),
)  # fmt: skip
options = st.fixed_dictionaries({
    "temperature": st.sampled_from([None, 0.0, 1e-6, 0.7, 1.5]), "top_k": st.sampled_from([None, -1, 1, 3, 50]),
    "top_p": st.sampled_from([None, 0.0, 0.3, 0.95, 1.0]), "min_p": st.sampled_from([None, 0.0, 0.02, 1.0]),
})  # fmt: skip


def random_rows(n, vocab, dtype, scale=4.0):
    return fenced((scale * torch.randn(n, vocab, device=DEVICE)).to(dtype))


@given(problems, options, st.booleans())
def test_agrees_with_the_definition(backend, problem, option, masked):
    n, vocab, dtype, seed, scale = problem
    logits, (seeds, pos), kwargs = random_rows(n, vocab, dtype, scale), keys(n, seed, seed // 2), params(n, **option)
    if masked:
        kwargs["bitmask"] = fenced(torch.randint(-(2**31), 2**31, (n, (vocab + 31) // 32), dtype=INT, device=DEVICE))
    assert_drawn(logits, seeds, pos, sample(logits, seeds, pos, **kwargs), **kwargs)


@given(st.integers(1, 4), st.sampled_from([5, 100, WIDE]), st.integers(0, 6))
def test_bias_agrees_with_the_definition(backend, n, vocab, entries):
    """Ragged, with repeated and out-of-range ids."""
    logits, (seeds, pos) = random_rows(n, vocab, torch.bfloat16), keys(n)
    counts = torch.randint(0, entries + 1, (n,))
    kwargs = {
        "bias_ids": fenced(torch.randint(-2, min(vocab, 8) + 2, (int(counts.sum()),), dtype=INT, device=DEVICE)),
        "bias_val": fenced(torch.randint(-3, 4, (int(counts.sum()),), device=DEVICE).to(FLOAT)),
        "bias_cu": tensor([0, *counts.cumsum(0).tolist()], INT),
    }
    assert_drawn(logits, seeds, pos, sample(logits, seeds, pos, **kwargs), **kwargs)


FILTERS = [
    {}, {"temperature": 0.0}, {"temperature": 0.6, "top_p": 0.95}, {"top_k": 50, "top_p": 0.95}, {"min_p": 0.05},
]  # fmt: skip


@pytest.mark.parametrize("option", FILTERS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT], ids=str)
def test_published_shape(backend, option, dtype):
    """V = 131072 with rows of a padded LM head: peaked as language models are, and flat."""
    wide = torch.randn(2, 131072 + 128, device=DEVICE)
    logits = (wide * torch.tensor([[5.0], [1.0]], device=DEVICE)).to(dtype)[:, :131072]
    (seeds, pos), kwargs = keys(2, 5, 2**33), params(2, **option)
    assert_drawn(logits, seeds, pos, sample(logits, seeds, pos, **kwargs), **kwargs)


# ---------------------------------------------------------------- the law

# Few finite logits in three tiles, token and tile ids among those that would share noise if the streams did.
SUPPORT = [0, 1, 2, 3, 700, TILE, TILE + 1, TILE + 4000, 2 * TILE + 36]
WEIGHTS = [3.0, 2.0, 1.0, 1.0, 4.0, 2.0, 3.0, 1.0, 3.0]


def law_row() -> torch.Tensor:
    row = torch.full((WIDE,), -INF, device=DEVICE)
    row[SUPPORT] = torch.tensor(WEIGHTS, device=DEVICE).log()
    return row


def assert_frequencies(counts: torch.Tensor, p: torch.Tensor):
    """Chi-square at level 1e-6."""
    expected = p * counts.sum()
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    freedom = len(p) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 4.76 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson-Hilferty
    assert chi2 < limit, f"chi-square {chi2:.1f}, limit {limit:.1f}: {counts.tolist()}, expected {expected.tolist()}"


def draws(backend) -> int:
    """The definition takes a millisecond for a draw, Triton's interpreter twenty."""
    return {"reference": 3000, "triton": 20000 if DEVICE == "cuda" else 120}.get(backend, 20000)


def law_counts(tokens: torch.Tensor) -> torch.Tensor:
    """Histogram over SUPPORT; a token outside it is an error."""
    where = {token: i for i, token in enumerate(SUPPORT)}
    return torch.tensor([where[t] for t in tokens.tolist()])


@pytest.mark.parametrize("by", ["seed", "pos"])
def test_law(backend, by):
    """Frequencies over many seeds at one position, and over many positions with one seed, are the softmax; so are
    those of pairs of neighbouring positions, as independent draws."""
    n = draws(backend)
    many, one = torch.arange(n, device=DEVICE), torch.full((n,), 3, device=DEVICE)
    seed, pos = (many, one) if by == "seed" else (one, many)
    tokens, logprobs, _ = sample(law_row().expand(n, -1), seed, pos)
    p = torch.tensor(WEIGHTS, dtype=torch.float64) / sum(WEIGHTS)
    index = law_counts(tokens)
    assert_frequencies(index.bincount(minlength=len(p)).double(), p)
    torch.testing.assert_close(logprobs.cpu().double(), p.log()[index], rtol=0, atol=1e-5)
    pairs = (index[0::2] * len(p) + index[1::2])[: n // 2]
    assert_frequencies(pairs.bincount(minlength=len(p) ** 2).double(), torch.outer(p, p).flatten())


def test_law_of_the_cut_row(backend):
    """Temperature 2 with top-k 4 keeps weights 4, 3, 3, 3: the third value has three ties."""
    n = draws(backend)
    many, zero = torch.arange(n, device=DEVICE), torch.zeros(n, dtype=LONG, device=DEVICE)
    tokens, _, _ = sample(
        law_row().expand(n, -1), many[:1], many, slot=zero.to(INT), **params(1, temperature=2.0, top_k=3)
    )
    kept = torch.tensor([WEIGHTS[i] if WEIGHTS[i] >= 3 else 0.0 for i in range(len(WEIGHTS))]).double().sqrt()
    counts = law_counts(tokens).bincount(minlength=len(WEIGHTS)).double()
    assert counts[kept == 0].sum() == 0
    assert_frequencies(counts[kept > 0], (kept / kept.sum())[kept > 0])


# ---------------------------------------------------------------- invariants


@given(options, st.integers(0, 5))
def test_a_row_sees_neither_batch_nor_slot(backend, option, i):
    """Alone, in a batch beside a row of NaN, in any slot: the same token and log-probability."""
    n, vocab = 6, TILE + 50
    logits, (seeds, pos), kwargs = random_rows(n, vocab, torch.bfloat16), keys(n, 11), params(n, **option)
    perm = torch.randperm(n)
    slots = {k: fenced(t[perm]) for k, t in {"seed": seeds, **kwargs}.items()}
    slot = perm.argsort().to(INT).to(DEVICE)  # where each row's parameters went
    logits[(i + 1) % n] = NAN
    whole = sample(logits, slots.pop("seed"), pos, slot=slot, **slots)
    one = {k: t[i : i + 1] for k, t in kwargs.items()}
    alone = sample(logits[i : i + 1], seeds[i : i + 1], pos[i : i + 1], **one)
    assert_same_bits(whole[0][i : i + 1], alone[0])
    torch.testing.assert_close(whole[1][i : i + 1], alone[1], rtol=1e-6, atol=1e-6)


def test_powers_of_two_cancel(backend):
    """Logits and temperature times 4, and logits plus a constant that is exact: the same tokens."""
    logits, (seeds, pos) = torch.randint(-20, 20, (8, 300), device=DEVICE).to(FLOAT), keys(8)
    want = sample(logits, seeds, pos, **params(8, temperature=1.5, top_p=0.9))
    for other, temperature in ((4 * logits, 6.0), (logits + 64, 1.5)):
        got = sample(other, seeds, pos, **params(8, temperature=temperature, top_p=0.9))
        assert torch.equal(got[0], want[0])


def test_filters_that_are_off_change_nothing(backend):
    logits, (seeds, pos) = random_rows(5, WIDE, torch.bfloat16), keys(5)
    want = sample(logits, seeds, pos)
    for off in ({"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}, {"top_k": WIDE, "min_p": -1.0},
                {"top_p": NAN, "min_p": NAN}):  # fmt: skip
        for a, b in zip(sample(logits, seeds, pos, **params(5, **off)), want, strict=True):
            assert_same_bits(a, b)


def test_mask_equals_a_bias_of_minus_infinity(backend):
    vocab, banned = 50, [3, 4, 31, 32, 49]
    logits, (seeds, pos) = random_rows(6, vocab, FLOAT, 1.0), keys(6)
    mask = bits([[t for t in range(vocab) if t not in banned]], vocab)
    by_mask = sample(logits, seeds, pos, bitmask=mask, bitmask_row=tensor([0] * 6, INT))
    by_bias = sample(
        logits, seeds, pos, bias_ids=tensor(banned * 6, INT), bias_val=tensor([-INF] * 30, FLOAT),
        bias_cu=tensor([5 * i for i in range(7)], INT),
    )  # fmt: skip
    for a, b in zip(by_mask, by_bias, strict=True):
        assert_same_bits(a, b)
    assert not set(by_mask[0].tolist()) & set(banned)


def test_bias_is_added(backend):
    """Exact in float32; repeated ids add up, ids outside the vocabulary do nothing, the next row is not touched."""
    logits, (seeds, pos) = torch.randint(-8, 8, (3, 20), device=DEVICE).to(torch.bfloat16), keys(3)
    dense = logits.float()
    dense[0, 3] += 2.0
    dense[0, 19] += 7.0 + 0.5
    dense[2, 0] -= 1.0
    want = sample(dense, seeds, pos)
    got = sample(
        logits, seeds, pos, bias_ids=tensor([19, 3, 20, 19, -1, 0], INT), bias_cu=tensor([0, 5, 5, 6], INT),
        bias_val=tensor([7.0, 2.0, 9.0, 0.5, 9.0, -1.0], FLOAT),
    )  # fmt: skip
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


def test_mask_rows_are_chosen(backend):
    """One mask per allowed token; -1 is no mask."""
    logits, (seeds, pos) = random_rows(4, 70, FLOAT), keys(4)
    mask = bits([[5], [69], [32]], 70)
    tokens, logprobs, _ = sample(logits, seeds, pos, bitmask=mask, bitmask_row=tensor([2, -1, 0, 1], INT))
    free = sample(logits, seeds, pos)
    assert tokens.tolist() == [32, free[0][1].item(), 5, 69]
    assert logprobs.tolist() == [0.0, free[1][1].item(), 0.0, 0.0]


def test_greedy(backend):
    """Lowest id among equals, in and across tiles, for a temperature of 0, next to 0, NaN and below 0; beside a
    sampled row."""
    logits = torch.zeros(5, WIDE, dtype=torch.bfloat16, device=DEVICE)
    logits[0, [TILE + 9, 2 * TILE + 1]] = 1.0
    logits[1, [17, 18]] = 1.0
    seeds, pos = keys(5)
    out = sample(logits, seeds, pos, **params(5, temperature=[0.0, 1e-6, NAN, -1.0, 1.0]))
    assert out[0].tolist()[:4] == [TILE + 9, 17, 0, 0] and out[1].tolist()[:4] == [0.0] * 4
    assert out[0][4] == sample(logits[4:], seeds[4:], pos[4:])[0][0]


def test_cold_is_greedy(backend):
    """Temperature 1e-4 and top-k 1 choose the argmax where it is unique."""
    logits, (seeds, pos) = torch.randn(8, 500, device=DEVICE), keys(8)
    want = sample(logits, seeds, pos, **params(8, temperature=0.0))[0]
    assert torch.equal(sample(logits, seeds, pos, **params(8, top_k=1))[0], want)
    assert torch.equal(sample(logits, seeds, pos, **params(8, temperature=1e-4, min_p=0.5))[0], want)


def test_forced_rows_are_not_looked_at(backend):
    logits, (seeds, pos) = random_rows(4, 40, FLOAT), keys(4)
    free = sample(logits, seeds, pos)
    logits[:2] = NAN
    tokens, logprobs, flags = sample(
        logits, seeds, pos, forced_token=tensor([39, 0, -1, 40], INT), bitmask=bits([[1]], 40),
        bitmask_row=tensor([0, 0, -1, -1], INT),
    )  # fmt: skip
    assert tokens.tolist() == [39, 0, *free[0].tolist()[2:]]
    assert logprobs.tolist() == [0.0, 0.0, *free[1].tolist()[2:]]
    assert flags.tolist() == [0, 0, 0, 8]


def test_rows_without_a_law(backend):
    """NaN counts as -inf; no support falls back to the lowest allowed token; nothing leaves the vocabulary."""
    vocab = 70
    logits = torch.zeros(9, vocab, device=DEVICE)
    logits[0] = NAN
    logits[1] = -INF
    logits[2, :69] = NAN  # one token left
    logits[3, 66] = INF  # takes all mass
    logits[4] = -INF  # and a mask
    logits[5, 3] = NAN  # masked: not seen
    logits[6] = -INF  # and an empty mask
    logits[8, 2:] = -INF
    masks = bits([[68, 69], [4], []], vocab)
    seeds, pos = keys(9)
    for option in ({}, {"temperature": 0.0}, {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.1}):
        tokens, logprobs, flags = sample(
            logits, seeds, pos, bitmask=masks, bitmask_row=tensor([-1, -1, -1, -1, 0, 1, 2, 2, 3], INT),
            **params(9, **option),
        )  # fmt: skip
        tokens, flags = tokens.tolist(), flags.tolist()
        assert tokens[:7] == [0, 0, 69, 66, 68, 4, 0] and 0 <= tokens[7] < vocab and tokens[8] in (0, 1)
        assert flags == [1 | 4, 4, 1, 0, 4, 0, 2 | 4, 2, 8]
        assert logprobs[:7].tolist() == [0.0] * 7


def test_infinities_share_the_mass(backend):
    logits, (seeds, pos) = random_rows(20, 100, FLOAT), keys(20)
    logits[:, [7, 90]] = INF
    tokens, logprobs, flags = sample(logits, seeds, pos, **params(20, top_k=1, top_p=0.1, min_p=1.0))
    assert set(tokens.tolist()) == {7, 90} and not flags.any()
    torch.testing.assert_close(logprobs, torch.full_like(logprobs, -math.log(2)))


def test_padding_rows(backend):
    """A negative slot, and one past the parameters, which is flagged; the others do not notice."""
    logits, (seeds, pos) = random_rows(4, 40, FLOAT), keys(4)
    want = sample(logits, seeds, pos)
    tokens, logprobs, flags = sample(logits, seeds, pos, slot=tensor([-1, 1, 4, 3], INT))
    assert tokens.tolist() == [-1, want[0][1].item(), -1, want[0][3].item()]
    assert logprobs.tolist() == [0.0, want[1][1].item(), 0.0, want[1][3].item()]
    assert flags.tolist() == [0, 0, 8, 0]


def test_bias_offsets_out_of_range_are_clamped(backend):
    logits, (seeds, pos) = torch.zeros(3, 10, device=DEVICE), keys(3)
    tokens, _, _ = sample(
        logits, seeds, pos, bias_ids=tensor([6, 5], INT), bias_val=tensor([100.0, 200.0], FLOAT),
        bias_cu=tensor([-1, 1, 99, 3], INT),
    )  # fmt: skip
    assert tokens.tolist()[:2] == [6, 5]


# ---------------------------------------------------------------- PyTorch


@pytest.mark.parametrize("n, full", [(3, False), (3, True), (0, True)])
def test_opcheck(n, full):
    logits, (seeds, pos) = random_rows(n, 40, torch.bfloat16), keys(n)
    kwargs = {}
    if full:
        kwargs = params(n, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1) | {
            "slot": tensor(list(range(n)), INT), "bitmask": bits([[1, 2]], 40), "bitmask_row": tensor([0] * n, INT),
            "forced_token": tensor([-1] * n, INT), "bias_ids": tensor([], INT), "bias_val": tensor([], FLOAT),
            "bias_cu": tensor([0] * (n + 1), INT),
        }  # fmt: skip
    torch.library.opcheck(torch.ops.n3.sample.default, (logits, seeds, pos), kwargs)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(dynamic):
    def step(logits, seeds, pos, temperature):
        tokens, logprobs, _ = sample(2 * logits, seeds, pos, temperature=temperature)
        return tokens + 1, logprobs

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (2, 5):
        args = (random_rows(n, 40, FLOAT), *keys(n), tensor([0.9] * n, FLOAT))
        for a, b in zip(compiled(*args), step(*args), strict=True):
            assert_same_bits(a, b)


z = torch.zeros
BAD = [
    ({"logits": z(4)}, "logits must have 2 dimensions, got 1"),
    ({"logits": z(2, 40, dtype=INT)}, "logits must be float32, float16 or bfloat16, got int32"),
    ({"logits": z(2, 0)}, "logits must have at least 1 column, got 0"),
    ({"logits": z(40, 2).t()}, "logits must have stride 1 along the last dimension, got 2"),
    ({"seed": z(2, dtype=INT)}, "seed must be int64, got int32"),
    ({"seed": z(2, 1, dtype=LONG)}, "seed must have 1 dimensions, got 2"),
    ({"seed": z(1, dtype=LONG)}, "seed must have at least 2 elements when slot is None, got 1"),
    ({"slot": z(2, dtype=LONG)}, "slot must be int32, got int64"),
    ({"slot": z(3, dtype=INT)}, "slot must have shape [2], got [3]"),
    ({"temperature": z(2, dtype=torch.bfloat16)}, "temperature must be float32, got bfloat16"),
    ({"temperature": z(1)}, "temperature must have shape [2], got [1]"),
    ({"top_k": z(2, dtype=LONG)}, "top_k must be int32, got int64"),
    ({"top_p": z(2, 1)}, "top_p must have shape [2], got [2, 1]"),
    ({"min_p": z(3)}, "min_p must have shape [2], got [3]"),
    ({"pos": z(2)}, "pos must be int64, got float32"),
    ({"pos": z(3, dtype=LONG)}, "pos must have shape [2], got [3]"),
    ({"bitmask": z(2, 2, dtype=LONG)}, "bitmask must be int32, got int64"),
    ({"bitmask": z(2, dtype=INT)}, "bitmask must have 2 dimensions, got 1"),
    ({"bitmask": z(2, 1, dtype=INT)}, "bitmask must have shape [2, 2], got [2, 1]"),
    ({"bitmask": z(3, 2, dtype=INT)}, "bitmask must have shape [2, 2], got [3, 2]"),
    ({"bitmask_row": z(2, dtype=INT)}, "bitmask_row must be None when bitmask is None"),
    (
        {"bitmask": z(5, 2, dtype=INT), "bitmask_row": z(3, dtype=INT)},
        "bitmask_row must have shape [2], got [3]",
    ),
    ({"forced_token": z(2, dtype=LONG)}, "forced_token must be int32, got int64"),
    ({"forced_token": z(1, dtype=INT)}, "forced_token must have shape [2], got [1]"),
    ({"bias_ids": z(1, dtype=INT)}, "bias_ids, bias_val and bias_cu must be given together, got 1 of 3"),
    (
        {"bias_ids": z(1, dtype=INT), "bias_val": z(2), "bias_cu": z(3, dtype=INT)},
        "bias_val must have shape [1], got [2]",
    ),
    (
        {"bias_ids": z(1, dtype=INT), "bias_val": z(1), "bias_cu": z(2, dtype=INT)},
        "bias_cu must have shape [3], got [2]",
    ),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    good = {"logits": z(2, 40), "seed": z(2, dtype=LONG), "pos": z(2, dtype=LONG)}
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in {**good, **change}.items()}
    with pytest.raises(RuntimeError) as error:
        sample(call.pop("logits"), call.pop("seed"), call.pop("pos"), **call)
    assert str(error.value) == f"n3::sample: {message}"
