from __future__ import annotations

import math
from itertools import accumulate

import pytest
import torch
from conftest import DEVICE, assert_close_to, assert_invariant, fenced
from hypothesis import given
from hypothesis import strategies as st
from moe_problems import fast

from n3kernels import use_backend
from n3kernels.moe import route

OPS = ("moe_route",)
INF, NAN = math.inf, math.nan

# tokens, 0 included; groups; experts per group; what a logit may be: few values, so that they tie, or any
problems = st.tuples(
    st.integers(0, 5), st.integers(1, 4), st.integers(1, 40), st.booleans(),
    st.sampled_from(["sigmoid", "softmax"]), st.booleans(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)  # fmt: skip
fractions = st.tuples(st.floats(0, 1), st.floats(0, 1))  # of what topk_group and top_k can be


def inputs(tokens, n_group, group_size, ties, score, normalize, dtype, fractions=(0.5, 0.5)):
    experts = n_group * group_size
    topk_group = 1 + int(fractions[0] * (n_group - 1))
    top_k = 1 + int(fractions[1] * (min(32, topk_group * group_size) - 1))
    logits = torch.randint(-1, 2, (tokens, experts)) if ties else torch.randn(tokens, experts)
    bias = torch.randint(-1, 2, (experts,)) / 4 if ties else torch.randn(experts) / 4
    options = {"top_k": top_k, "n_group": n_group, "topk_group": topk_group, "score": score, "normalize": normalize}
    return fenced(logits.to(dtype).to(DEVICE)), fenced(bias.float().to(DEVICE)), {**options, "scale": 2.5}


def definition(logits, bias, *, top_k, n_group, topk_group, score, normalize, scale):
    """Token by token, in Python; near-ties, which float32 scores may break differently, are left to luck."""
    experts = logits.shape[1]
    size = experts // n_group
    all_ids, all_weights = [], []
    for row in logits.double().tolist():
        if score == "sigmoid":
            scores = [1 / (1 + math.exp(-v)) for v in row]
        else:
            scores = [math.exp(v - max(row)) for v in row]
            scores = [v / math.fsum(scores) for v in scores]
        scores = torch.tensor(scores, dtype=torch.float32)
        choice = (scores + bias.cpu()).tolist()
        group_score = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(n_group)]
        kept = sorted(range(n_group), key=lambda g: (-group_score[g], g))[:topk_group]
        allowed = [e for e in range(experts) if e // size in kept]
        ids = sorted(allowed, key=lambda e: (-choice[e], e))[:top_k]
        weights = scores.double()[ids]
        all_ids.append(ids)
        all_weights.append((weights / (weights.sum() + 1e-20) if normalize else weights) * scale)
    shape = (len(all_ids), top_k)
    weights = torch.stack(all_weights) if all_weights else torch.empty(shape, dtype=torch.double)
    return torch.tensor(all_ids, dtype=torch.int32).view(shape), weights


@given(problems, fractions)
def test_agrees_with_the_definition(backend, problem, fractions):
    logits, bias, options = inputs(*problem, fractions)
    ids, weights, counts, flags = (t.cpu() for t in route(logits, bias, **options))
    true_ids, true_weights = definition(logits, bias, **options)
    assert torch.equal(ids, true_ids)
    assert weights.dtype == torch.float32
    assert_close_to(weights, true_weights, scale=true_weights)
    assert torch.equal(counts, torch.bincount(true_ids.flatten(), minlength=logits.shape[1]).int())
    assert torch.equal(flags, torch.zeros(len(ids), dtype=torch.int32))


@given(problems, st.integers(0, 4))
def test_a_row_does_not_see_the_batch(backend, problem, i):
    tokens, *rest = problem
    logits, bias, options = inputs(max(tokens, i) + 2, *rest)
    logits[-1] = NAN
    whole = route(logits, bias, **options)
    alone = route(logits[i : i + 1], bias, **options)
    assert torch.equal(whole[0][i : i + 1], alone[0]) and torch.equal(whole[3][i : i + 1], alone[3])
    assert_invariant(backend, whole[1][i : i + 1], alone[1])
    assert whole[3].tolist() == [0] * (len(logits) - 1) + [1]


@given(problems, fractions)
def test_weights_have_one_order_of_arithmetic(backend, problem, fractions):
    """The chosen scores are added in the order of the ids, divided, scaled: float32 at each step, so that all backends
    agree to the bit. A score is its float64 value rounded once; softmax's own sum may round the other way."""
    logits, bias, options = inputs(*problem, fractions)
    ids, weights, _, _ = (t.cpu() for t in route(logits, bias, **options))
    wide = logits.double().cpu()
    scores = (wide.sigmoid() if options["score"] == "sigmoid" else wide.softmax(1)).float().gather(1, ids.long())
    if options["normalize"]:
        total = torch.zeros(len(ids))
        for j in range(options["top_k"]):
            total = total + scores[:, j]
        scores = scores / (total + 1e-20)[:, None]
    truth = scores * 2.5
    if options["score"] == "sigmoid":
        assert torch.equal(weights, truth)
    else:
        assert ((weights - truth).abs() <= 3e-7 * truth).all()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("experts", [37, 511, 1023])
def test_equal_logits_tie_wherever_they_stand(backend, score, experts):
    """In a vector register or behind the last: the lowest indices win in each of 40 rows of one number each."""
    logits = torch.randn(40, 1, device=DEVICE).expand(40, experts)
    ids, weights, _, _ = route(logits, top_k=9, score=score, normalize=False)
    assert ids.tolist() == [list(range(9))] * 40
    assert torch.equal(weights, weights[:, :1].expand(40, 9))


def test_sums_that_round_to_one_number_tie(backend):
    """The choice is a float32: a bias of 1e8 hides every score, and the weights still tell them apart."""
    logits, bias = torch.randn(5, 64, device=DEVICE), torch.full((64,), 1e8, device=DEVICE)
    ids, weights, _, _ = route(logits, bias, top_k=6, normalize=False)
    assert ids.tolist() == [list(range(6))] * 5
    assert_close_to(weights.cpu(), logits[:, :6].cpu().double().sigmoid())


def test_biases_that_are_not_numbers(backend):
    """NaN and -inf come last, the lower index first; +inf first."""
    bias = torch.tensor([NAN, 0.0, -INF, INF, 1.0, NAN], device=DEVICE)
    ids, weights, _, flags = route(torch.zeros(1, 6, device=DEVICE), bias, top_k=6, normalize=False)
    assert ids.tolist() == [[3, 4, 1, 0, 2, 5]]
    assert weights.tolist() == [[0.5] * 6] and not flags.any()


@pytest.mark.parametrize("n_group", [1, 4])
def test_rows_may_change_places(backend, n_group):
    logits, bias = torch.randn(25, 64, device=DEVICE), torch.randn(64, device=DEVICE) / 4
    places, options = torch.randperm(25).to(DEVICE), {"top_k": 6, "n_group": n_group, "topk_group": (n_group + 1) // 2}
    plain, moved = route(logits, bias, **options), route(logits[places], bias, **options)
    assert torch.equal(moved[0], plain[0][places])
    assert_invariant(backend, moved[1], plain[1][places])
    assert torch.equal(moved[2], plain[2])


def test_experts_may_be_renamed(backend):
    """Without ties and groups the numbers of the experts do not matter, to the bit."""
    logits, bias = torch.randn(9, 128, device=DEVICE), torch.randn(128, device=DEVICE) / 4
    new = torch.randperm(128).to(DEVICE)
    plain, named = route(logits, bias, top_k=6), route(logits[:, new.argsort()], bias[new.argsort()], top_k=6)
    assert torch.equal(named[0], new[plain[0].long()].int())
    assert torch.equal(named[1], plain[1])
    assert torch.equal(named[2][new], plain[2])


@pytest.mark.parametrize("which", fast("moe_route"))
def test_many_rows_and_threads(which):
    logits, bias = torch.randn(3000, 128, device=DEVICE), torch.randn(128, device=DEVICE) / 4
    threads, results = torch.get_num_threads(), []
    with use_backend(which):
        parts = [route(rows, bias, top_k=6) for rows in logits.split(700)]
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(route(logits, bias, top_k=6))
        finally:
            torch.set_num_threads(threads)
    for ids, weights, counts, _ in results:
        assert torch.equal(ids, torch.cat([p[0] for p in parts]))
        assert_invariant(which, weights, torch.cat([p[1] for p in parts]))
        assert torch.equal(counts, sum(p[2] for p in parts))


def test_one_expert(backend):
    ids, weights, counts, _ = route(torch.tensor([[-3.0], [4.0]], device=DEVICE), top_k=1, scale=2.5)
    assert ids.tolist() == [[0], [0]] and counts.tolist() == [2]
    assert_close_to(weights.cpu(), torch.full((2, 1), 2.5).double())


BAD_ROWS = {
    "all NaN": torch.full((512,), NAN),
    "one NaN": torch.cat([torch.tensor([NAN]), torch.randn(511)]),
    "only 5 usable": torch.cat([torch.full((507,), NAN), torch.randn(5)]),
    "all inf": torch.full((512,), INF),
    "all -inf": torch.full((512,), -INF),
    "inf, -inf and NaN": torch.tensor([INF, -INF, NAN, 0.0]).repeat(128),
}
TAME_ROWS = {
    "all equal": torch.full((512,), 0.25),
    "very negative": torch.full((512,), -1e30),
    "sum of scores near 1e-20": torch.full((512,), -50.0),
    "very large": torch.full((512,), 3e38),
}


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_that_are_not_numbers(backend, score, biased):
    """(512, 22): ids distinct and in range in every row, weights finite, other rows untouched, flags exact."""
    torch.manual_seed(1)
    good = torch.randn(3, 512)
    rows = torch.stack([*BAD_ROWS.values(), *TAME_ROWS.values(), *good]).to(DEVICE)
    bias = torch.randn(512, device=DEVICE) / 4 if biased else None
    ids, weights, counts, flags = route(rows, bias, top_k=22, score=score, scale=5.0)
    assert all(len(set(row)) == 22 and 0 <= min(row) and max(row) < 512 for row in ids.tolist())
    assert weights.isfinite().all() and (weights >= 0).all()
    assert flags.tolist() == [1] * len(BAD_ROWS) + [0] * (len(TAME_ROWS) + 3)
    assert counts.sum() == ids.numel()
    alone = route(good.to(DEVICE), bias, top_k=22, score=score, scale=5.0)
    assert torch.equal(ids[-3:], alone[0])
    assert_invariant(backend, weights[-3:], alone[1])
    assert ids[0].tolist() == list(range(22)) and not weights[0].any()  # nothing usable: the first experts, weight 0


def test_sigmoid_keeps_the_usable_experts(backend):
    """NaN comes last, +inf counts as score 1, -inf as score 0."""
    logits = torch.tensor([[NAN, -1.0, NAN, 2.0, 0.0], [0.0, -INF, 1.0, INF, NAN]], device=DEVICE)
    ids, weights, _, flags = route(logits, top_k=4, normalize=False)
    assert ids.tolist() == [[3, 4, 1, 0], [3, 2, 0, 1]] and flags.tolist() == [1, 1]
    truth = torch.tensor([[2.0, 0.0, -1.0, -INF], [INF, 1.0, 0.0, -INF]]).double().sigmoid()
    assert_close_to(weights.cpu(), truth, scale=truth)


def test_ties_go_to_the_lowest_index(backend):
    ids, weights, _, _ = route(torch.zeros(3, 512, device=DEVICE), top_k=22, scale=5.0)
    assert ids.tolist() == [list(range(22))] * 3
    assert_close_to(weights.cpu(), torch.full((3, 22), 5 / 22).double())
    ids, *_ = route(torch.zeros(1, 64, device=DEVICE), top_k=6, n_group=8, topk_group=2)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    last = torch.zeros(1, 64, device=DEVICE)
    last[0, 63] = 1
    assert route(last, top_k=4, n_group=8, topk_group=2)[0].tolist() == [[63, 0, 1, 2]]


def test_a_group_without_a_chance_is_never_used(backend):
    """Even NaN in a group that is kept goes before the experts of a group that is not."""
    logits = torch.tensor([[9.0, 9.0, 9.0, 9.0, 8.0, NAN, NAN, NAN]], device=DEVICE)
    bias = torch.tensor([0.0, 0, 0, 0, 5, 5, 5, 5], device=DEVICE)
    assert route(logits, bias, top_k=4, n_group=2)[0].tolist() == [[0, 1, 2, 3]]
    logits[0, 5] = 8.0
    assert route(logits, bias, top_k=4, n_group=2)[0].tolist() == [[4, 5, 6, 7]]


def test_the_epsilon_decides_where_all_scores_vanish(backend):
    """Scores near 1e-20 keep part of their sum, far below it the weights go to 0: never 0 / 0."""
    logits = torch.tensor([-40.0, -46.0, -60.0, -200.0], device=DEVICE)[:, None].expand(4, 8)
    scores = logits.cpu().double().sigmoid()[:, :2]
    scores[3] = 0  # below float32
    truth = scores / (scores.sum(1, keepdim=True) + 1e-20)
    weights = route(logits, top_k=2)[1].cpu()
    assert ((weights - truth).abs() <= 1e-5 * truth).all()
    assert 0.3 < truth[1, 0] < 0.4 and truth[2, 0] < 1e-5


def test_bias_chooses_but_does_not_weigh(backend):
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]], device=DEVICE)
    bias = torch.tensor([10.0, 0, 0, 0], device=DEVICE)
    ids, weights, _, _ = route(logits, bias, top_k=2, normalize=False)
    assert ids.tolist() == [[0, 3]]
    assert_close_to(weights.cpu(), torch.tensor([[0.0, 3.0]]).double().sigmoid())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_logits_are_widened(backend, dtype):
    logits = torch.randn(4, 128, device=DEVICE).to(dtype)
    for a, b in zip(route(logits, top_k=6), route(logits.float(), top_k=6), strict=True):
        assert torch.equal(a, b)


def test_strided_logits(backend):
    logits = torch.randn(128, 6, device=DEVICE).t()[::2]
    for a, b in zip(route(logits, top_k=6), route(logits.contiguous(), top_k=6), strict=True):
        assert a.is_contiguous() and torch.equal(a, b)


def test_expert_map_renames_what_is_returned(backend):
    """Replicas for EPLB, -1 for an expert that is elsewhere: choice, weights and counts stay as they are."""
    logits = torch.randn(5, 16, device=DEVICE)
    where = torch.randint(-1, 40, (16,), dtype=torch.int32, device=DEVICE)
    plain, mapped = route(logits, top_k=4), route(logits, top_k=4, expert_map=where)
    assert torch.equal(mapped[0], where[plain[0].long()])
    assert all(torch.equal(a, b) for a, b in zip(plain[1:], mapped[1:], strict=True))


PUBLISHED = [(128, 6, 2.5), (512, 22, 5.0), (512, 4, 5.0), (512, 18, 5.0), (896, 16, 1.0), (1024, 32, 1.0), (256, 1, 1)]


@pytest.mark.parametrize("experts, top_k, scale", PUBLISHED)
def test_published_shapes(backend, experts, top_k, scale):
    logits, bias = torch.randn(17, experts, device=DEVICE), torch.randn(experts, device=DEVICE) / 4
    ids, weights, counts, _ = (t.cpu() for t in route(logits, bias, top_k=top_k, scale=scale))
    choice = (logits.cpu().double().sigmoid() + bias.cpu()).topk(top_k)
    assert torch.equal(ids.sort().values, choice.indices.sort().values.int())
    assert_close_to(weights.double().sum(1), torch.full((17,), scale).double())
    assert counts.sum() == 17 * top_k


def test_counts_bound_a_prefix(backend):
    """What `counts` is for: an offset table, without another pass over the ids."""
    ids, _, counts, _ = route(torch.randn(40, 64, device=DEVICE), top_k=6)
    assert list(accumulate(counts.tolist()))[-1] == 240
    assert counts.tolist() == [(ids == e).sum().item() for e in range(64)]


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mapped", [False, True])
def test_gradients(score, normalize, mapped):
    logits = torch.randn(3, 12, dtype=torch.double, device=DEVICE, requires_grad=True)
    bias = torch.randn(12, dtype=torch.double, device=DEVICE)
    where = torch.arange(11, -1, -1, dtype=torch.int32, device=DEVICE) if mapped else None
    options = {"top_k": 3, "n_group": 3, "topk_group": 2, "score": score, "normalize": normalize, "scale": 2.5}
    torch.autograd.gradcheck(lambda x: route(x, bias, expert_map=where, **options)[1], (logits,))


def test_gradients_of_bad_rows_are_zero():
    logits = torch.tensor([[NAN, NAN, NAN], [0.0, NAN, 1.0], [INF, 0.0, -INF]], requires_grad=True)
    route(logits, top_k=2)[1].square().sum().backward()
    assert logits.grad.isfinite().all() and not logits.grad[0].any() and logits.grad[1, 0] != 0


# opcheck adds up all outputs in the dtype of the first, here integer, and fails at that where a gradient is asked for;
# test_compile covers what it would have.
WITHOUT_AOT = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(tokens, grad):
    logits = torch.randn(tokens, 16, device=DEVICE, requires_grad=grad)
    options = {"top_k": 3, "n_group": 4, "topk_group": 2, "scale": 2.5}
    where, bias = torch.arange(16, dtype=torch.int32, device=DEVICE), torch.randn(16, device=DEVICE)
    utils = WITHOUT_AOT if grad else "ALL"
    torch.library.opcheck(torch.ops.n3.moe_route.default, (logits, bias), options, test_utils=utils)
    torch.library.opcheck(
        torch.ops.n3.moe_route.default, (logits,), {**options, "expert_map": where}, test_utils=utils
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    fn = torch.compile(lambda x, b: route(x, b, top_k=3, scale=2.5)[:2], fullgraph=True, backend="aot_eager",
                       dynamic=dynamic)  # fmt: skip
    bias = torch.randn(16, device=DEVICE)
    for tokens in (4, 7):
        x = torch.randn(tokens, 16, device=DEVICE, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        (ids, weights), truth = fn(x, bias), route(y, bias, top_k=3, scale=2.5)
        assert torch.equal(ids, truth[0]) and torch.equal(weights, truth[1])
        weights.square().sum().backward()
        truth[1].square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)


MAP = torch.zeros(8, dtype=torch.int32)
GOOD = {"logits": torch.zeros(2, 8), "bias": torch.zeros(8), "top_k": 2, "expert_map": MAP}
BAD = [
    ({"logits": torch.zeros(2, 8, dtype=torch.int64)}, "logits must be float32, float16 or bfloat16, got int64"),
    ({"logits": torch.zeros(8)}, "logits must have 2 dimensions, got 1"),
    ({"logits": torch.zeros(2, 0)}, "logits must have 1 to 1024 columns, got 0"),
    ({"logits": torch.zeros(2, 1025)}, "logits must have 1 to 1024 columns, got 1025"),
    ({"score": "relu"}, "score must be one of sigmoid, softmax, got relu"),
    ({"bias": torch.zeros(7)}, "bias must have shape [8], got [7]"),
    ({"bias": torch.zeros(8, dtype=torch.bfloat16)}, "bias must be float32, got bfloat16"),
    ({"n_group": 3}, "n_group must divide the 8 experts, got 3"),
    ({"n_group": 0}, "n_group must divide the 8 experts, got 0"),
    ({"n_group": 4, "topk_group": 5}, "topk_group must be between 1 and n_group 4, got 5"),
    ({"topk_group": 0}, "topk_group must be between 1 and n_group 1, got 0"),
    ({"top_k": 0}, "top_k must be between 1 and 8, got 0"),
    ({"top_k": 9}, "top_k must be between 1 and 8, got 9"),
    ({"n_group": 4, "topk_group": 2, "top_k": 5}, "top_k must be between 1 and 4, got 5"),
    ({"logits": torch.zeros(2, 64), "bias": None, "expert_map": None, "top_k": 33},
     "top_k must be between 1 and 32, got 33"),
    ({"expert_map": torch.zeros(8, dtype=torch.int64)}, "expert_map must be int32, got int64"),
    ({"expert_map": torch.zeros(9, dtype=torch.int32)}, "expert_map must have shape [8], got [9]"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BAD)
def test_bad_calls(backend, change, message):
    call = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in {**GOOD, **change}.items()}
    with pytest.raises(RuntimeError) as error:
        route(**call)
    assert str(error.value) == f"n3::moe_route: {message}"
