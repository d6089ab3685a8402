from __future__ import annotations

import random

import pytest
import torch
from conftest import DEVICE, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st

from n3kernels.mtp import sample, verify

OPS = ("mtp_verify",)
INT, FLOAT, LONG = torch.int32, torch.float32, torch.int64
VOCAB = 43


def tensor(values, dtype) -> torch.Tensor:
    return fenced(torch.tensor(values, dtype=dtype, device=DEVICE))


class Model:
    """A target whose logits depend on the whole context, and one request that samples from it."""

    def __init__(self, seed: int, vocab: int = VOCAB, **params):
        self.seed, self.vocab, self.params = seed, vocab, params
        self.prompt = [seed % vocab]

    def logits(self, output: list[int]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((self.seed, *self.prompt, *output)) % 2**63)
        return (2 * torch.randn(self.vocab, generator=generator)).to(torch.bfloat16)

    def plain(self, steps: int) -> tuple[list[int], list[float]]:
        """Decoding without drafts, one token after the other."""
        output, logprobs = [], []
        for _ in range(steps):
            token, logprob, _ = sample(
                self.logits(output)[None].to(DEVICE), tensor([self.seed], LONG), tensor([len(output)], LONG),
                **{k: tensor([v], INT if k == "top_k" else FLOAT) for k, v in self.params.items()},
            )  # fmt: skip
            output.append(token.item())
            logprobs.append(logprob.item())
        return output, logprobs


def call(models, outputs, drafts, slots, n_slots, **options):
    """One verification of all requests: rows are the target's logits on each hypothetical prefix. A slot of -1 pads."""
    rows, checked, cu = [], [], [0]
    seed = torch.full((n_slots,), 987654321)
    names = sorted({name for model in models for name in model.params})
    params = {name: torch.zeros(n_slots, dtype=INT if name == "top_k" else FLOAT) for name in names}
    for model, output, draft, slot in zip(models, outputs, drafts, slots, strict=True):
        if slot >= 0:
            rows += [model.logits(output + [t for t in draft[:i] if t >= 0]) for i in range(len(draft) + 1)]
            checked += [*draft, -1]
            seed[slot] = model.seed
            for name in names:
                params[name][slot] = model.params[name]
        cu.append(len(rows))
    logits = fenced(torch.stack(rows).to(DEVICE)) if rows else torch.zeros(0, VOCAB, device=DEVICE)
    pos = [len(output) for output in outputs]
    return verify(
        logits, tensor(checked, INT), tensor(cu, INT), fenced(seed.to(DEVICE)), tensor(pos, LONG),
        slot=tensor(slots, INT), **{k: fenced(v.to(DEVICE)) for k, v in params.items()}, **options,
    )  # fmt: skip


def drafts_for(truth: list[int], k: int, rng: random.Random) -> list[int]:
    """k drafts: right for a while, then anything, now and then none."""
    right = rng.randint(0, k)
    tail = [rng.choice([rng.randrange(VOCAB), truth[i], -1]) for i in range(right, k)]
    return truth[:right] + tail


SETTINGS = [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 5, "top_p": 0.9, "min_p": 0.02}]
LENGTH = 8


@pytest.mark.op("mtp_verify", "sample")
@given(st.integers(0, 10**6), st.sampled_from(SETTINGS), st.integers(1, 3), st.integers(0, 4))
def test_coupled_is_plain_decoding(backend, seed, params, requests, max_drafts):
    """Any drafter, any number of drafts, any slot, with padding requests: the tokens and log-probabilities of plain
    decoding with the same seed, bit for bit."""
    rng, length = random.Random(seed), LENGTH
    if backend == "triton" and DEVICE == "cpu":  # whose interpreter takes twenty milliseconds for a row
        requests, length, max_drafts = 1, 2, min(max_drafts, 2)
    models = [Model(seed + i, **params) for i in range(requests)]
    truth = [model.plain(length + max_drafts + 1) for model in models]
    outputs = [[] for _ in models]
    while min(map(len, outputs)) < length:
        n_slots = requests + rng.randint(0, 3)
        slots = rng.sample(range(n_slots), requests)
        batch = [row for row in zip(models, outputs, slots, strict=True) if len(row[1]) < length]
        batch += [(models[0], [], -1)] * rng.randint(0, 2)
        rng.shuffle(batch)
        drafts = [
            drafts_for(truth[models.index(model)][0][len(output) :], rng.randint(0, max_drafts), rng)
            for model, output, _ in batch
        ]
        batch_models, batch_outputs, batch_slots = (list(column) for column in zip(*batch, strict=True))
        tokens, num, last, logprobs, flags = call(
            batch_models, batch_outputs, drafts, batch_slots, n_slots, mode="coupled", max_drafts=max_drafts
        )
        assert not flags.any()
        row = 0
        for b, slot in enumerate(batch_slots):
            count = num[b].item()
            assert tokens[b, count:].tolist() == [-1] * (max_drafts + 1 - count)
            assert logprobs[b, count:].tolist() == [0.0] * (max_drafts + 1 - count)
            if slot < 0:
                assert count == 0 and last[b] == -1
                continue
            want, want_logprobs = truth[models.index(batch_models[b])]
            at = len(batch_outputs[b])
            accepted = 0
            while accepted < len(drafts[b]) and drafts[b][accepted] == want[at + accepted]:
                accepted += 1
            assert tokens[b, :count].tolist() == want[at : at + accepted + 1]
            assert logprobs[b, :count].tolist() == want_logprobs[at : at + accepted + 1]
            assert last[b] == row + accepted
            row += len(drafts[b]) + 1
            batch_outputs[b] += tokens[b, :count].tolist()
    for output, (want, _) in zip(outputs, truth, strict=True):
        assert output[:length] == want[:length]


@given(st.integers(0, 10**6), st.integers(0, 4), st.integers(1, 4))
def test_greedy_is_the_argmax(backend, seed, max_drafts, requests):
    """Whatever the temperature; ties go to the lowest id."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    counts = [rng.randint(0, max_drafts + 1) for _ in range(requests)]
    cu = [sum(counts[:i]) for i in range(requests + 1)]
    logits = torch.randint(0, 6, (cu[-1], VOCAB), generator=generator).to(torch.bfloat16)
    best = [max(range(VOCAB), key=lambda t, row=row: (row[t], -t)) for row in logits.tolist()]
    drafts = [rng.choice([t, t, t, 0, -1]) for t in best]
    tokens, num, last, logprobs, flags = verify(
        fenced(logits.to(DEVICE)), tensor(drafts, INT), tensor(cu, INT), tensor([seed] * requests, LONG),
        tensor([0] * requests, LONG), max_drafts=max_drafts, temperature=tensor([2.0] * requests, FLOAT),
    )  # fmt: skip
    assert not flags.any() and not logprobs.any()
    for b in range(requests):
        want = []
        for r in range(cu[b], cu[b + 1]):
            want.append(best[r])
            if drafts[r] != best[r]:
                break
        assert tokens[b].tolist() == want + [-1] * (max_drafts + 1 - len(want))
        assert num[b] == len(want) and last[b] == (cu[b] + len(want) - 1 if want else -1)


def one_request(targets, drafts, vocab=VOCAB, max_drafts=None, cu=None, **options):
    """Greedy verification of one request whose rows have the given argmaxes."""
    logits = torch.zeros(len(targets), vocab, device=DEVICE)
    logits[torch.arange(len(targets)), torch.tensor(targets)] = 5.0
    zero = tensor([0], LONG)
    out = verify(
        options.pop("logits", logits), tensor(drafts, INT), tensor(cu or [0, len(targets)], INT), zero, zero,
        max_drafts=len(targets) - 1 if max_drafts is None else max_drafts, **options,
    )  # fmt: skip
    return [t[0].tolist() for t in (out[0], out[1], out[2], out[4])]


def test_the_chain_ends_at_the_first_missing_draft(backend):
    assert one_request([4, 5, 6, 7], [4, -1, 6, -1]) == [[4, 5, -1, -1], 2, 1, 0]
    assert one_request([4, 5, 6, 7], [-7, 5, 6, -1]) == [[4, -1, -1, -1], 1, 0, 0]
    assert one_request([4], [-1]) == [[4], 1, 0, 0]


def test_a_draft_past_the_vocabulary_is_rejected(backend):
    assert one_request([4, 5, 6], [4, VOCAB, -1]) == [[4, 5, -1], 2, 1, 8]
    assert one_request([4, 5, 6], [2, VOCAB, -1]) == [[4, -1, -1], 1, 0, 0], "the row is not reached"


def test_rows_past_the_last_draft_are_not_looked_at(backend):
    assert one_request([4, 5, 6, 7], [4, 5, 6, 7], max_drafts=1) == [[4, 5], 2, 1, 0]
    assert one_request([4, 5, 6, 7], [4, 5, 6, 7], max_drafts=6) == [[4, 5, 6, 7, -1, -1, -1], 4, 3, 0]


@pytest.mark.parametrize("cu, first, count", [([-3, 2], 0, 2), ([1, 99], 1, 2), ([2, 1], 0, 0), ([7, 9], 0, 0)])
def test_row_offsets_are_clamped(backend, cu, first, count):
    tokens, num, last, _ = one_request([4, 5, 6], [4, 5, 6], cu=cu)
    assert tokens == [4, 5, 6][first : first + count] + [-1] * (3 - count)
    assert num == count and last == (first + count - 1 if count else -1)


def test_nothing_follows_eos(backend):
    """Accepted as a draft, emitted in place of one, or as the last token."""
    eos = tensor([2, 11], INT)
    assert one_request([4, 11, 6, 7], [4, 11, 6, -1], eos_ids=eos) == [[4, 11, -1, -1], 2, 1, 0]
    assert one_request([4, 2, 6, 7], [4, 5, 6, -1], eos_ids=eos) == [[4, 2, -1, -1], 2, 1, 0]
    assert one_request([4, 5, 2], [4, 5, -1], eos_ids=eos) == [[4, 5, 2], 3, 2, 0]
    assert one_request([4, 5, 2], [4, 5, -1], eos_ids=tensor([], INT)) == [[4, 5, 2], 3, 2, 0]


def test_only_emitted_rows_are_flagged(backend):
    logits = torch.zeros(3, VOCAB, device=DEVICE)
    logits[1, 3], logits[2] = float("nan"), -float("inf")
    assert one_request([0, 0, 0], [1, 0, -1], logits=logits)[1::2] == [1, 0]
    assert one_request([0, 0, 0], [0, 1, -1], logits=logits)[1::2] == [2, 1]
    assert one_request([0, 0, 0], [0, 0, -1], logits=logits)[1::2] == [3, 1 | 4]


def test_forced_tokens_and_masks_by_row(backend):
    """Row 0 is forced, row 1 is masked to one token, row 2 is biased: drafts that say so are accepted."""
    mask = torch.zeros(1, 2, dtype=INT, device=DEVICE)
    mask[0, 1] = 1 << (40 - 32)
    edits = {
        "forced_token": tensor([30, -1, -1, -1], INT), "bitmask": mask, "bitmask_row": tensor([-1, 0, -1, -1], INT),
        "bias_ids": tensor([9], INT), "bias_val": tensor([100.0], FLOAT), "bias_cu": tensor([0, 0, 0, 1, 1], INT),
    }  # fmt: skip
    for mode in ("greedy", "coupled"):
        assert one_request([1, 2, 3, 4], [30, 40, 9, -1], mode=mode, **edits)[0][:3] == [30, 40, 9]
        assert one_request([1, 2, 3, 4], [1, 40, 9, -1], mode=mode, **edits)[:2] == [[30, -1, -1, -1], 1]


def test_padding_requests(backend):
    """No rows, a negative slot, a slot past the parameters: nothing is emitted, and only the last is flagged."""
    logits = torch.eye(4, 10, device=DEVICE)
    out = verify(
        logits, tensor([-1] * 4, INT), tensor([0, 1, 1, 2, 3, 4], INT), tensor([5, 6], LONG), tensor([0] * 5, LONG),
        max_drafts=2, slot=tensor([1, 0, -1, 2, 0], INT),
    )  # fmt: skip
    tokens, num, last, logprobs, flags = (t.tolist() for t in out)
    none = [-1, -1, -1]
    assert tokens == [[0, -1, -1], none, none, none, [3, -1, -1]]
    assert num == [1, 0, 0, 0, 1] and last == [0, -1, -1, -1, 3] and flags == [0, 0, 0, 8, 0]


@pytest.mark.parametrize("b, n", [(0, 0), (0, 3), (2, 0)])
def test_empty(backend, b, n):
    out = verify(
        torch.zeros(n, 8, device=DEVICE), tensor([-1] * n, INT), tensor([0] * (b + 1), INT), tensor([0] * b, LONG),
        tensor([0] * b, LONG), max_drafts=3, mode="coupled",
    )  # fmt: skip
    assert [tuple(t.shape) for t in out] == [(b, 4), (b,), (b,), (b, 4), (b,)]
    assert (out[0] == -1).all() and not out[1].any() and (out[2] == -1).all()


@pytest.mark.op("mtp_verify", "sample")
@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT], ids=str)
def test_published_shape(backend, dtype):
    """V = 131072, three drafts, top-p: rows are those of `sample`; padded logits, in any mode."""
    if backend == "triton" and DEVICE == "cpu" and dtype == FLOAT:
        pytest.skip("as bfloat16; seconds in Triton's interpreter")
    logits = (4 * torch.randn(8, 131072 + 64, device=DEVICE)).to(dtype)[:, :131072]
    seed, params = tensor([3, 4], LONG), {"temperature": tensor([0.8, 1.0], FLOAT), "top_p": tensor([0.95, 0.9], FLOAT)}
    slot, pos = tensor([0] * 4 + [1] * 4, INT), tensor([10, 11, 12, 13, 20, 21, 22, 23], LONG)
    want, want_logprobs, _ = sample(logits, seed, pos, slot=slot, **params)
    drafts = want.clone()
    drafts[6] = 77
    out = verify(logits, drafts, tensor([0, 4, 8], INT), seed, pos[::4], mode="coupled", max_drafts=3, **params)
    assert out[0].tolist() == [want[:4].tolist(), want[4:7].tolist() + [-1]]
    assert_same_bits(out[3][0], want_logprobs[:4])
    assert out[1].tolist() == [4, 3] and out[2].tolist() == [3, 6]
    best = logits.float().argmax(1).to(INT)
    greedy = verify(logits, best, tensor([0, 4, 8], INT), seed, pos[::4], max_drafts=3)
    assert torch.equal(greedy[0].flatten(), best)


# ---------------------------------------------------------------- PyTorch


def good_call(mode="greedy"):
    return {
        "logits": torch.zeros(4, VOCAB), "draft_tokens": torch.zeros(4, dtype=INT),
        "cu_rows": torch.tensor([0, 2, 4], dtype=INT), "seed": torch.zeros(2, dtype=LONG),
        "pos": torch.zeros(2, dtype=LONG), "mode": mode, "max_drafts": 1,
    }  # fmt: skip


def to_device(kwargs):
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}


@pytest.mark.parametrize("mode", ["greedy", "coupled"])
def test_opcheck(mode):
    kwargs = to_device(good_call(mode))
    args = [kwargs.pop(name) for name in ("logits", "draft_tokens", "cu_rows", "seed", "pos")]
    torch.library.opcheck(torch.ops.n3.mtp_verify.default, args, kwargs)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(dynamic):
    def step(logits, drafts, cu, seed, pos):
        tokens, num, *_ = verify(logits + 1, drafts, cu, seed, pos, mode="coupled", max_drafts=2)
        return tokens, pos + num

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for b in (1, 3):
        args = (
            torch.randn(3 * b, VOCAB, device=DEVICE), tensor([1, 2, -1] * b, INT), tensor(range(0, 3 * b + 1, 3), INT),
            tensor([8] * b, LONG), tensor([9] * b, LONG),
        )  # fmt: skip
        for x, y in zip(compiled(*args), step(*args), strict=True):
            assert_same_bits(x, y)


# ---------------------------------------------------------------- laws of drafts, lossy modes


def outcome(logits, drafts, **options):
    n = len(logits)
    tokens, count, last, logprobs, flags = verify(
        logits.to(DEVICE), tensor([*drafts, -1], INT), tensor([0, n], INT), tensor([3], LONG), tensor([9], LONG),
        max_drafts=n - 1, **options,
    )  # fmt: skip
    return tokens[0, : count[0]].tolist(), int(flags[0]), logprobs[0]


@pytest.mark.parametrize("mode", ["token", "block"])
def test_a_draft_that_was_not_drawn_is_rejected(backend, mode):
    """q(d) = 0, NaN or not listed: flag 16; a draft past V: flag 8."""
    logits = torch.tensor([[5.0, 5.0, -20.0, -20.0], [0.0, 9.0, 0.0, 0.0]])
    ids = tensor([[1, -1], [-1, -1]], INT)
    for draft, probs, flag in ((0, 1.0, 16), (1, 0.0, 16), (1, torch.nan, 16), (7, 1.0, 8)):
        laws = {"draft_ids": ids, "draft_probs": torch.tensor([[probs, 0.0], [0.0, 0.0]], device=DEVICE)}
        tokens, flags, _ = outcome(logits, [draft], mode=mode, **laws)
        assert len(tokens) == 1 and flags == flag, draft


@pytest.mark.parametrize("mode", ["token", "block"])
def test_an_accepted_eos_ends_the_chain(backend, mode):
    logits = torch.full((4, 6), -30.0)
    logits[torch.arange(4), torch.tensor([2, 3, 4, 5])] = 30.0
    assert outcome(logits, [2, 3, 4], mode=mode)[0] == [2, 3, 4, 5]
    assert outcome(logits, [2, 3, 4], mode=mode, eos_ids=tensor([3], INT))[0] == [2, 3]
    assert outcome(logits, [2, -1, 4], mode=mode)[0] == [2, 3]


@pytest.mark.parametrize("mode", ["token", "block"])
def test_a_smaller_vocabulary_of_the_drafter(backend, mode):
    """The same law as ids of the target, and as columns of its own."""
    words = tensor([4, 0, 2], INT)
    logits, own = torch.randn(2, 6), torch.randn(2, 3)
    sparse = {"draft_ids": tensor([[0, 1, 2]] * 2, INT), "draft_probs": own.softmax(1).to(DEVICE)}
    dense = {"draft_logits": own.to(DEVICE)}
    for draft in (4, 0, 2):
        got = [outcome(logits, [draft], mode=mode, draft_vocab=words, **laws) for laws in (sparse, dense)]
        mapped = outcome(logits, [draft], mode=mode, draft_probs=sparse["draft_probs"],
                             draft_ids=words[sparse["draft_ids"].long()])  # fmt: skip
        assert all(g[:2] == mapped[:2] for g in got)


def test_lossy_modes(backend):
    logits = torch.tensor([[2.0, 1.9, 0.0, -9.0], [0.0, 0.0, 3.0, 0.0]])
    near = {"mode": "relaxed", "allow_lossy": True, "relaxed_top_k": 2, "relaxed_delta": 0.1}
    assert outcome(logits, [1], **near)[0] == [1, 2]  # second best, and near
    assert outcome(logits, [2], **near)[0] == [0]  # not among two
    assert outcome(logits, [1], **near | {"relaxed_delta": 1e-3})[0] == [0]  # too far
    assert outcome(logits, [1], **near | {"relaxed_top_k": 1})[0] == [0]
    typical = {"mode": "typical", "allow_lossy": True}
    assert outcome(logits, [1], **typical)[0][0] == 1  # 0.44 > min(0.3, 0.09 exp(-1))
    plain = outcome(logits[:1], [], mode="coupled")[0]
    assert outcome(logits, [3], **typical)[0] == plain  # improbable: what sample emits


BAD = [
    ({"logits": torch.zeros(4)}, "logits must have 2 dimensions, got 1"),
    ({"logits": torch.zeros(4, 8, dtype=LONG)}, "logits must be float32, float16 or bfloat16, got int64"),
    ({"draft_tokens": torch.zeros(4, dtype=LONG)}, "draft_tokens must be int32, got int64"),
    ({"draft_tokens": torch.zeros(3, dtype=INT)}, "draft_tokens must have shape [4], got [3]"),
    ({"cu_rows": torch.zeros(3, dtype=LONG)}, "cu_rows must be int32, got int64"),
    ({"cu_rows": torch.zeros(3, 1, dtype=INT)}, "cu_rows must have 1 dimensions, got 2"),
    ({"cu_rows": torch.zeros(0, dtype=INT)}, "cu_rows must have at least 1 element, got 0"),
    ({"seed": torch.zeros(1, dtype=LONG)}, "seed must have at least 2 elements when slot is None, got 1"),
    ({"slot": torch.zeros(4, dtype=INT)}, "slot must have shape [2], got [4]"),
    ({"top_p": torch.zeros(4)}, "top_p must have shape [2], got [4]"),
    ({"pos": torch.zeros(4, dtype=LONG)}, "pos must have shape [2], got [4]"),
    ({"pos": torch.zeros(2, dtype=INT)}, "pos must be int64, got int32"),
    ({"mode": "best"}, "mode must be one of greedy, coupled, token, block, relaxed, typical, got best"),
    ({"mode": "relaxed"}, "allow_lossy must be True in mode relaxed, got False"),
    ({"mode": "typical", "allow_lossy": True, "relaxed_top_k": 0}, "relaxed_top_k must be at least 1, got 0"),
    ({"mode": "token", "draft_ids": torch.zeros(4, 1, dtype=INT)},
     "draft_ids and draft_probs must be given together or not at all, got 1 of 2"),
    ({"mode": "token", "draft_ids": torch.zeros(4, 65, dtype=INT), "draft_probs": torch.zeros(4, 65)},
     "draft_ids must have 1 to 64 columns, got 65"),
    ({"mode": "block", "draft_temperature": torch.ones(2)}, "draft_temperature must be None without draft_logits"),
    ({"mode": "block", "draft_logits": torch.zeros(4, 3)}, "draft_logits must have shape [4, 43], got [4, 3]"),
    ({"mode": "block", "draft_logits": torch.zeros(4, 3), "draft_vocab": torch.tensor(1, dtype=torch.int32)},
     "draft_vocab must have 1 dimensions, got 0"),
    ({"mode": "coupled", "uniforms": torch.zeros(4, 2, dtype=torch.float64)}, "uniforms must be None in mode coupled"),
    ({"mode": "token", "uniforms": torch.zeros(4, 2)}, "uniforms must be float64, got float32"),
    ({"max_drafts": -1}, "max_drafts must be at least 0, got -1"),
    ({"eos_ids": torch.zeros(1, dtype=LONG)}, "eos_ids must be int32, got int64"),
    ({"eos_ids": torch.zeros((), dtype=INT)}, "eos_ids must have 1 dimensions, got 0"),
    ({"forced_token": torch.zeros(2, dtype=INT)}, "forced_token must have shape [4], got [2]"),
    ({"bitmask": torch.zeros(2, 2, dtype=INT)}, "bitmask must have shape [4, 2], got [2, 2]"),
    ({"bias_val": torch.zeros(2)}, "bias_ids, bias_val and bias_cu must be given together, got 1 of 3"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    with pytest.raises(RuntimeError) as error:
        verify(**to_device({**good_call(), **change}))
    assert str(error.value) == f"n3::mtp_verify: {message}"
