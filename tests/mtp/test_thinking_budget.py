from __future__ import annotations

import random

import pytest
import torch
from conftest import DEVICE, assert_same_bits, fenced
from hypothesis import given
from hypothesis import strategies as st

from n3kernels.mtp import ThinkingBudget, sample, thinking_budget, verify

OPS = ("thinking_budget",)
INT, LONG = torch.int32, torch.int64


def tensor(values) -> torch.Tensor:
    return fenced(torch.tensor(values, dtype=INT, device=DEVICE))


class Official:
    """The official processor, one committed token after the other (NVIDIA-NeMo/Nemotron, nano_v3 logit processors),
    with what it leaves open decided: a negative budget is off, a negative grace is 0."""

    def __init__(self, thinking, budget, grace, end_ids, end_think_ids, newlines):
        self.state = "think" if thinking else "done"
        self.budget, self.grace, self.end_ids = budget, max(grace, 0), list(end_ids)
        self.end_think_ids, self.newlines = end_think_ids, newlines

    def forced(self, output: list[int]) -> int:
        """Called at every length of the output, in order; the token to force next, -1 for none."""
        if self.state != "done" and any(ends_with(output, s) for s in self.end_think_ids):
            self.state = "done"
        if self.state == "think" and self.budget >= 0:
            n, newline = len(output), bool(output) and output[-1] in self.newlines
            if n >= self.budget + self.grace or (n >= self.budget and newline):
                self.state = "force"
        if self.state == "force":
            overlap = max(k for k in range(len(self.end_ids) + 1) if k == 0 or ends_with(output, self.end_ids[:k]))
            if overlap < len(self.end_ids):
                return self.end_ids[overlap]
            self.state = "done"
        return -1


def ends_with(output, string) -> bool:
    return len(string) > 0 and len(output) >= len(string) and output[-len(string) :] == list(string)


class Request:
    """One request: rules, a model that answers every prefix, and the plain run of the official processor."""

    def __init__(self, seed, thinking=True, budget=3, grace=0, end_ids=(8, 5), end_think=((5,),), newlines=(7, 8),
                 says=(1, 2, 3, 4, 5, 6, 7, 8, 8)):  # fmt: skip
        self.seed, self.thinking, self.says = seed, thinking, says
        self.rules = (budget, grace, list(end_ids), end_think, newlines)

    def free(self, output: list[int]) -> int:
        """What the model would say: few tokens, so that end strings and newlines happen by themselves."""
        return random.Random(str((self.seed, output))).choice(self.says)

    def plain(self, steps: int) -> tuple[list[int], list[int]]:
        processor, output, forced = Official(self.thinking, *self.rules), [], []
        for _ in range(steps):
            forced.append(processor.forced(output))
            output.append(forced[-1] if forced[-1] >= 0 else self.free(output))
        return output, forced


def batch_of(requests) -> ThinkingBudget:
    """The helper, for requests that share the strings."""
    budgets, graces, ends, thinks, newlines = zip(*(r.rules for r in requests), strict=True)
    return ThinkingBudget(
        [[9, 9, 12, 1010] if r.thinking else [12, 9] for r in requests], list(budgets), list(graces),
        end_ids=ends[0], end_think_ids=thinks[0], newline_ids=newlines[0], device=DEVICE,
    )  # fmt: skip


def decode(requests, splits, length):
    """Runs all requests with drafts; ``splits(b, at)`` gives request b's drafts at a length of ``at``. Compares every
    reached row with the official processor, and the outputs at the end."""
    truth = [r.plain(length + 12) for r in requests]
    thinking, outputs = batch_of(requests), [[] for _ in requests]
    while min(map(len, outputs)) < length:
        drafts = [splits(b, len(output)) if len(output) < length else [] for b, output in enumerate(outputs)]
        cu = [0]
        for d in drafts:
            cu.append(cu[-1] + len(d) + 1)
        forced = thinking.forced(tensor([t for d in drafts for t in [*d, -1]]), tensor(cu)).tolist()
        emitted = []
        for b, (request, output, draft) in enumerate(zip(requests, outputs, drafts, strict=True)):
            want, want_forced = truth[b]
            out = []
            for i, row in enumerate(forced[cu[b] : cu[b + 1]]):
                assert row == want_forced[len(output) + i], f"request {b}, output {output}, drafts {draft[:i]}"
                out.append(row if row >= 0 else request.free(output + out))
                if i == len(draft) or draft[i] != out[i]:
                    break
            assert out == want[len(output) : len(output) + len(out)]
            emitted.append(out if len(output) < length else [])
            output += emitted[-1]
        width = max(map(len, emitted))
        thinking.advance(tensor([e + [-1] * (width - len(e)) for e in emitted]), tensor([len(e) for e in emitted]))
    return thinking


strings = st.lists(st.sampled_from([5, 6, 7, 8]), max_size=4)
rules = st.tuples(strings, st.lists(st.lists(st.sampled_from([5, 6, 8]), max_size=2), max_size=2))


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 4), rules)
def test_agrees_with_the_official_processor(backend, seed, count, max_drafts, rule):
    """Any budgets, strings and newlines; right drafts, wrong ones and none; batches whose requests differ."""
    rng = random.Random(seed)
    end_ids, end_think = rule
    requests = [
        Request(
            seed + b, rng.random() < 0.9, rng.randint(-1, 8), rng.randint(-2, 4), end_ids, end_think,
            newlines=(7, 8, 40) if seed % 2 else (),
        )
        for b in range(count)
    ]  # fmt: skip
    truth = [r.plain(40)[0] for r in requests]

    def drafts(b, at):
        k = rng.randint(0, max_drafts)
        right = rng.randint(0, k)
        return truth[b][at : at + right] + [rng.choice([-1, 5, 7, 8, truth[b][at + i]]) for i in range(right, k)]

    decode(requests, drafts, length=4 if interpreted(backend) else 16)


def interpreted(backend: str) -> bool:
    """Triton's interpreter takes milliseconds for a row."""
    return backend == "triton" and DEVICE == "cpu"


def compositions(n: int):
    """All ways to cut n into parts."""
    if n == 1:
        return [[1]]
    return [parts for c in compositions(n - 1) for parts in ([1, *c], [c[0] + 1, *c[1:]])]


@pytest.mark.parametrize("end_ids", [(5,), (8, 5), (8, 8, 5), (1, 2, 1, 2, 5)])
@pytest.mark.parametrize("budget", [0, 4])
def test_every_split_of_the_end_string(backend, end_ids, budget):
    """The end string over every possible boundary of calls, one request for each, with drafts that are always right:
    forced to the end, and free after it."""
    if interpreted(backend) and (budget or len(end_ids) > 2):
        pytest.skip("thousands of rows in Triton's interpreter")
    request = Request(1, budget=budget, grace=1, end_ids=end_ids, says=(1, 2, 3, 8))
    truth, forced = request.plain(30)
    first = next(i for i, f in enumerate(forced) if f >= 0)
    last = max(i for i, f in enumerate(forced) if f >= 0)
    assert truth[last + 1 - len(end_ids) : last + 1] == list(end_ids) and budget <= first <= budget + 1
    length = last + 3
    ends = [[sum(parts[: i + 1]) for i in range(len(parts))] for parts in compositions(length)]

    def drafts(b, at):  # up to the end of its part
        return truth[at : next(end for end in ends[b] if end > at) - 1]

    thinking = decode([request] * len(ends), drafts, length)
    assert not thinking.active.any()


def call(drafts, tail, n, budget, grace=0, end_ids=(8, 5), end_think=(5,), newlines=1 << 7 | 1 << 8, active=1):
    return thinking_budget(
        tensor([*drafts, -1]), tensor([0, len(drafts) + 1]), tensor([tail]), tensor([n]), tensor([active]),
        tensor([budget]), tensor([grace]), tensor(end_ids), tensor(end_think), tensor([newlines]),
    ).tolist()  # fmt: skip


def test_by_hand(backend):
    assert call([], [1, 2], 2, 2) == [8], "the budget is spent"
    assert call([], [1, 2], 2, 3) == [-1], "one token is left"
    assert call([1], [1, 2], 2, 3) == [-1, 8], "spent by the draft"
    assert call([1, 8, 5, 4], [1, 2], 2, 3) == [-1, 8, 5, -1, -1], "forced along the drafts, free after them"
    assert call([1, 3, 3], [1, 2], 2, 3) == [-1, 8, 8, 8], "rows after a wrong draft start over"
    assert call([1, 2, 7, 4], [1, 2], 2, 4, grace=9) == [-1, -1, -1, 8, 8], "at a newline within the grace"
    assert call([7, 2], [1, 2], 2, 4, grace=9) == [-1, -1, -1], "a newline before the budget is not one"
    assert call([2], [8, 1], 2, 1, grace=9) == [8, 8], "a newline that was committed has begun it"
    assert call([2], [8, 1], 1, 1, grace=9) == [-1, -1], "unless it is a token of the prompt"
    assert call([2], [8, 1], 1, 0, grace=9) == [-1, -1], "even if the budget is 0"
    assert call([2], [8, 1], 2, 2, grace=9) == [-1, -1], "or if it came before the budget was spent"
    assert call([2], [1, 8], 0, 0, grace=9) == [-1, -1], "the prompt's last token is no newline"
    assert call([2], [1, 8], 0, 0) == [8, 8], "nor a part of the end string"
    assert call([5, 2, 2], [1, 2], 2, 2, grace=1) == [-1, -1, -1, -1], "ended by itself"
    assert call([5], [1, 8], 2, 2) == [5, -1], "the overlap counts what the model said"
    assert call([1], [1, 2], 2, 2, active=0) == [-1, -1]
    assert call([1], [1, 2], 2, -1) == [-1, -1], "no budget"
    assert call([1], [1, 2], 2, 0, end_ids=(-1, -1)) == [-1, -1], "nothing to force"
    assert call([1], [1, 2], 2, 0, end_ids=(6, -1)) == [6, 6], "padded"
    assert call([1, -1, 3], [1, 2], 2, 3) == [-1, 8, -1, -1], "rows past a missing draft are free"
    assert call([6], [1, 2], 2, 3, end_think=[[6, -1], [4, 4]]) == [-1, -1], "one of two strings"
    assert call([32, 2**30], [1, 2], 2, 2, grace=9) == [-1, -1, -1], "ids past the newlines' mask"
    assert call([1], [1, 2], 2, 2**31 - 1, grace=2**31 - 1) == [-1, -1], "the sum does not overflow"


def test_rows_of_no_request_are_free(backend):
    """Padding requests, rows before, between and after: -1. Offsets out of range are clamped."""
    i = tensor
    forced = thinking_budget(
        i([-1] * 6), i([1, 2, 2, 99]), i([[1, 2]] * 3), i([2] * 3), i([1] * 3), i([0] * 3), i([0] * 3),
        i([[3, -1], [4, -1], [6, 5]]), i([5]), i([]),
    )  # fmt: skip
    assert forced.tolist() == [-1, 3, 6, -1, -1, -1]
    assert thinking_budget(i([]), i([0]), torch.zeros(0, 2, dtype=INT, device=DEVICE), *[i([])] * 4,
                           i([4]), i([5]), i([])).shape == (0,)  # fmt: skip


def test_state_is_advanced_over_committed_tokens():
    """Two requests, of which one ends its thinking in the middle of a call and one emits less; one never thought."""
    thinking = ThinkingBudget(
        [[12, 1010], [12, 1010], [12, 9]], [2, 9, 2], end_ids=[8, 5], newline_ids=[], device=DEVICE
    )
    thinking.forced(tensor([8, -1, -1, 1, -1]), tensor([0, 2, 3, 5]))
    assert thinking.num_output.tolist() == [0, 0, 0] and thinking.active.tolist() == [1, 1, 0]
    thinking.advance(tensor([[1, 2, 8], [3, -1, -1], [4, 4, 4]]), tensor([3, 1, 3]))
    assert thinking.num_output.tolist() == [3, 1, 3] and thinking.active.tolist() == [1, 1, 0]
    assert thinking.committed_tail.tolist() == [[2, 8], [-1, 3], [4, 4]]
    thinking.advance(tensor([[5, 6], [13, 7], [4, 4]]), tensor([1, 1, 0]))
    assert thinking.num_output.tolist() == [4, 2, 3] and thinking.active.tolist() == [0, 0, 0]
    assert thinking.committed_tail.tolist() == [[8, 5], [3, 13], [4, 4]]


@pytest.mark.op("thinking_budget", "mtp_verify", "sample")
def test_suggests_the_rest_of_what_is_forced():
    prompts = [[5, 12, 1010], [5, 12, 1010], [5]]
    thinking = ThinkingBudget(prompts, [0, 9, 0], end_ids=(20, 21, 22), device=DEVICE)
    assert thinking.suggest(2).tolist() == [[20, 21], [-1, -1], [-1, -1]]
    one = torch.ones(3, dtype=torch.int32, device=DEVICE)
    thinking.advance(torch.tensor([[20], [20], [20]], dtype=torch.int32, device=DEVICE), one)
    assert thinking.suggest(4).tolist() == [[21, 22, -1, -1], [-1] * 4, [-1] * 4]
    thinking.advance(torch.tensor([[21, 22]] * 3, dtype=torch.int32, device=DEVICE), 2 * one)
    assert thinking.suggest(1).tolist() == [[-1], [-1], [-1]]
    assert thinking.suggest(0).shape == (3, 0)


@pytest.mark.parametrize("mode", ["greedy", "coupled"])
def test_with_verification(backend, mode):
    """Sampling with forced tokens, and verification with drafts and forced tokens: the same text, and it ends its
    thinking in time."""
    vocab, length, end = 24, 20, [8, 5]

    def logits(output):
        return torch.randn(vocab, generator=torch.Generator().manual_seed(hash(tuple(output)) % 2**63))

    def run(drafter):
        thinking = ThinkingBudget([[12, 1010]], 6, 2, end_ids=end, end_think_ids=[[5]], newline_ids=[8], device=DEVICE)
        output, rng = [], random.Random(0)
        while len(output) < length:
            drafts = drafter(output, rng)
            rows = torch.stack([logits(output + drafts[:i]) for i in range(len(drafts) + 1)]).to(DEVICE)
            checked, cu = tensor([*drafts, -1]), tensor([0, len(drafts) + 1])
            tokens, num, *_ = verify(
                rows, checked, cu, torch.tensor([4], device=DEVICE), torch.tensor([len(output)], device=DEVICE),
                mode=mode, max_drafts=4, forced_token=thinking.forced(checked, cu),
            )  # fmt: skip
            thinking.advance(tokens, num)
            output += tokens[0, : num[0]].tolist()
        return output[:length]

    plain = run(lambda output, rng: [])
    assert 5 in plain[:10] and run(lambda output, rng: plain[len(output) : len(output) + 3]) == plain
    assert run(lambda output, rng: [rng.choice([8, 5, 1]) for _ in range(4)]) == plain
    first = sample(logits([])[None].to(DEVICE), torch.tensor([4], device=DEVICE), torch.tensor([0], device=DEVICE))
    assert mode == "greedy" or first[0].item() == plain[0]


def good_call():
    return {
        "draft_tokens": torch.full((4,), -1, dtype=INT), "cu_rows": torch.tensor([0, 2, 4], dtype=INT),
        "committed_tail": torch.zeros(2, 3, dtype=INT), "num_output": torch.zeros(2, dtype=INT),
        "active": torch.ones(2, dtype=INT), "budget": torch.zeros(2, dtype=INT), "grace": torch.zeros(2, dtype=INT),
        "end_ids": torch.tensor([8, 5], dtype=INT), "end_think_ids": torch.tensor([5], dtype=INT),
        "newline_bitmask": torch.zeros(1, dtype=INT),
    }  # fmt: skip


def to_device(kwargs):
    return {k: v.to(DEVICE) for k, v in kwargs.items()}


def test_opcheck():
    torch.library.opcheck(torch.ops.n3.thinking_budget.default, tuple(to_device(good_call()).values()))


def test_compiles():
    def step(**call):
        return thinking_budget(**call) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_same_bits(compiled(**to_device(good_call())), step(**to_device(good_call())))


def ints(*shape):
    return torch.zeros(shape, dtype=INT)


BAD = [
    ({"draft_tokens": torch.zeros(4, dtype=LONG)}, "draft_tokens must be int32, got int64"),
    ({"draft_tokens": ints(4, 1)}, "draft_tokens must have 1 dimensions, got 2"),
    ({"cu_rows": torch.zeros(3)}, "cu_rows must be int32, got float32"),
    ({"cu_rows": ints(0)}, "cu_rows must have at least 1 element, got 0"),
    ({"committed_tail": torch.zeros(2, 3, dtype=LONG)}, "committed_tail must be int32, got int64"),
    ({"committed_tail": ints(6)}, "committed_tail must have 2 dimensions, got 1"),
    ({"committed_tail": ints(3, 3)}, "committed_tail must have shape [2, 3], got [3, 3]"),
    (
        {"committed_tail": ints(2, 1)},
        "committed_tail must have at least 2 columns, the length of the longest end string, got 1",
    ),
    ({"num_output": torch.zeros(2, dtype=LONG)}, "num_output must be int32, got int64"),
    ({"active": torch.zeros(2, dtype=torch.bool)}, "active must be int32, got bool"),
    ({"budget": ints(3)}, "budget must have shape [2], got [3]"),
    ({"grace": ints(2, 1)}, "grace must have shape [2], got [2, 1]"),
    ({"end_ids": ints(3, 2)}, "end_ids must have shape [2, 2], got [3, 2]"),
    ({"end_ids": ints(1, 1, 1)}, "end_ids must have 1 or 2 dimensions, got 3"),
    ({"end_think_ids": ints()}, "end_think_ids must have 1 or 2 dimensions, got 0"),
    ({"newline_bitmask": ints(1, 1)}, "newline_bitmask must have 1 dimensions, got 2"),
]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    with pytest.raises(RuntimeError) as error:
        thinking_budget(**to_device({**good_call(), **change}))
    assert str(error.value) == f"n3::thinking_budget: {message}"
