"""The text of the CUDA kernels on rows of logits, run on the CPU by tests/cuda_emulator: the operators' tests with the
kernels in the operators' place, and the CPU kernels' results.

It proves nothing about a GPU, where the same tests run through the dispatcher.
"""

from __future__ import annotations

import ctypes
import math

import emulated
import laws
import pytest
import test_draft_sample
import test_laws
import test_sample
import test_verify
import test_verify_thresholds
import test_verify_tree
import torch
from conftest import fenced
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_text import needs_emulator

from n3kernels import use_backend
from n3kernels.mtp import draft_sample, sample, verify, verify_tree

pytestmark = needs_emulator
few = settings(max_examples=5, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
INT, FLOAT, LONG = torch.int32, torch.float32, torch.int64
STRUCTURES = [emulated.RowArgs, emulated.SampleArgs, emulated.VerifyArgs, emulated.DraftSampleArgs, emulated.TreeArgs]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The kernels in the operators' place; what a test changes of them is undone behind it."""
    monkeypatch.setattr(emulated, "reversed_threads", False)
    monkeypatch.setattr(test_sample, "sample", emulated.sample)
    monkeypatch.setattr(test_verify, "verify", emulated.verify)
    monkeypatch.setattr(laws, "verify", emulated.verify)
    monkeypatch.setattr(test_verify_tree, "verify", emulated.verify)
    monkeypatch.setattr(test_verify_tree, "verify_tree", emulated.verify_tree)
    monkeypatch.setattr(test_draft_sample, "draft_sample", emulated.draft_sample)
    monkeypatch.setattr(test_verify_thresholds, "verify", emulated.verify)
    monkeypatch.setattr(test_verify_thresholds, "verify_tree", emulated.verify_tree)


@pytest.fixture(params=[False, True], ids=["ascending", "descending"])
def order(request, monkeypatch):
    """In which threads take their turns."""
    monkeypatch.setattr(emulated, "reversed_threads", request.param)


def test_the_structures_have_the_layout_of_the_kernels():
    for which, structure in enumerate(STRUCTURES):
        assert ctypes.sizeof(structure) == emulated.kernels().size_of_arguments(which), structure.__name__


def test_a_row_takes_no_more_than_two_kibibytes():
    for entries, heats in ((64, False), (1, True)):
        assert emulated.kernels().bytes_of_a_unit(ctypes.c_int64(131072), ctypes.c_int64(entries), heats) <= 2048


SAMPLE = """mask_equals_a_bias_of_minus_infinity bias_is_added mask_rows_are_chosen greedy forced_rows_are_not_looked_at
    rows_without_a_law infinities_share_the_mass padding_rows bias_offsets_out_of_range_are_clamped
    filters_that_are_off_change_nothing cold_is_greedy""".split()
VERIFY = """the_chain_ends_at_the_first_missing_draft a_draft_past_the_vocabulary_is_rejected padding_requests
    rows_past_the_last_draft_are_not_looked_at nothing_follows_eos only_emitted_rows_are_flagged
    forced_tokens_and_masks_by_row lossy_modes""".split()
BY_LAW = ["a_draft_that_was_not_drawn_is_rejected", "an_accepted_eos_ends_the_chain"]


@pytest.mark.parametrize("test", SAMPLE)
def test_sampling(test, order):
    getattr(test_sample, f"test_{test}")("emulated")


@pytest.mark.parametrize("test", VERIFY)
def test_verification(test, order):
    getattr(test_verify, f"test_{test}")("emulated")


@pytest.mark.parametrize("test", BY_LAW)
@pytest.mark.parametrize("mode", ["token", "block"])
def test_verification_by_law(test, mode, order):
    getattr(test_verify, f"test_{test}")("emulated", mode)


@pytest.mark.parametrize("mode", ["token", "block"])
def test_ids_of_a_smaller_vocabulary(mode):
    words, ids = torch.tensor([4, 0, 2], dtype=INT), torch.tensor([[0, 1, 2, 3]] * 2, dtype=INT)
    logits, probs = torch.randn(2, 6), torch.randn(2, 4).softmax(1)
    for draft in (4, 0, 2):
        small = test_verify.outcome(logits, [draft], mode=mode, draft_vocab=words, draft_ids=ids, draft_probs=probs)
        tokens = torch.tensor([[4, 0, 2, -1]] * 2, dtype=INT)
        plain = test_verify.outcome(logits, [draft], mode=mode, draft_ids=tokens, draft_probs=probs)
        assert small[:2] == plain[:2]


@pytest.mark.parametrize("test", ["same_seed_and_position_same_draft", "greedy_ties_and_rows_without_support",
                                  "padding_and_a_smaller_vocabulary"])  # fmt: skip
def test_drafting(test, order):
    getattr(test_draft_sample, f"test_{test}")("emulated")


@pytest.mark.parametrize("test", ["the_path_of_a_wide_tree", "padding_and_what_is_no_node",
                                  "the_smallest_uniform_does_not_accept_the_impossible"])  # fmt: skip
def test_trees(test, order):
    getattr(test_verify_tree, f"test_{test}")("emulated")


@pytest.mark.parametrize("mode", ["greedy", "coupled"])
def test_a_tree_without_branches_is_a_chain(mode):
    test_verify_tree.test_a_tree_without_branches_is_a_chain("emulated", mode)


@pytest.mark.parametrize("cu, first, count", [([-3, 2], 0, 2), ([1, 99], 1, 2), ([2, 1], 0, 0), ([7, 9], 0, 0)])
def test_row_offsets_are_clamped(cu, first, count):
    test_verify.test_row_offsets_are_clamped("emulated", cu, first, count)


@pytest.mark.parametrize("mode, form, ratios", test_verify_thresholds.CASES)
def test_every_threshold_of_chains(mode, form, ratios):
    test_verify_thresholds.test_chains("emulated", mode, form, ratios)


@pytest.mark.parametrize("form", ["certain", "sparse", "mapped"])
def test_every_threshold_of_trees(form):
    test_verify_thresholds.test_trees("emulated", form)


def test_every_threshold_of_lossy_modes():
    test_verify_thresholds.test_relaxed("emulated")
    test_verify_thresholds.test_typical("emulated")


def test_the_law_is_the_targets(monkeypatch):
    monkeypatch.setattr(laws, "STEPS", 20)
    toy = laws.Toy(3, 1, support=2, filters={"temperature": 0.8}, generator=test_laws.generator(9))
    assert test_laws.distance(toy, "block", "sparse") <= 1e-6


# ---------------------------------------------------------------- against the CPU kernels

vocabularies = st.sampled_from([1, 7, 33, 1000, 4096, 4097, 9001])
filters = st.fixed_dictionaries({
    "temperature": st.sampled_from([None, 0.0, 0.7, 1.5, 1e6]), "top_k": st.sampled_from([None, 1, 3, 50, 700]),
    "top_p": st.sampled_from([None, 0.0, 0.3, 0.95]), "min_p": st.sampled_from([None, 0.02, 1.0]),
})  # fmt: skip


def rows(n: int, vocab: int, dtype: torch.dtype, padded: bool) -> torch.Tensor:
    """Values with many ties, now and then NaN or infinite; rows may begin anywhere."""
    x = (4 * torch.randn(n, vocab + 3)).to(dtype)
    strange = torch.tensor([math.nan, -math.inf, -0.0, 0.0, 3e38]).to(dtype)
    x = torch.where(torch.rand(x.shape) < 0.02, strange[torch.randint(5, x.shape)], x)
    return fenced(x)[:, 1 : vocab + 1] if padded else fenced(x[:, :vocab].contiguous())


def edits(n: int, vocab: int) -> dict[str, torch.Tensor]:
    count, words = 5 * n, torch.randint(-(2**31), 2**31, (3, (vocab + 31) // 32))
    return {
        "bitmask": (words & torch.tensor([[0], [-1], [77]])).to(INT),
        "bitmask_row": torch.randint(-1, 4, (n,), dtype=INT),
        "forced_token": torch.where(torch.rand(n) < 0.15, torch.randint(0, vocab + 1, (n,)), -1).to(INT),
        "bias_ids": torch.randint(-1, min(vocab, 5000) + 1, (count,), dtype=INT),
        "bias_val": torch.randn(count).round(),
        "bias_cu": torch.arange(0, count + 1, 5, dtype=INT),
    }  # fmt: skip


def assert_same(mine, truth):
    for name, a, b in zip(("tokens", "num_emitted", "last_row", "logprobs", "flags"), mine, truth, strict=True):
        if a.dtype == INT:
            assert torch.equal(a, b), f"{name}: {a.tolist()}, expected {b.tolist()}"
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_sample_agrees_with_the_cpu_kernel():
    @few
    @given(vocabularies, st.sampled_from(emulated.DTYPES), filters, st.booleans(), st.booleans(), st.integers(0, 99))
    def agrees(vocab, dtype, option, edited, padded, seed):
        torch.manual_seed(seed)
        emulated.reversed_threads = seed % 2 == 1
        logits, (seeds, pos) = rows(3, vocab, dtype, padded), test_sample.keys(3, seed)
        options = test_sample.params(3, **option) | (edits(3, vocab) if edited else {})
        mine, truth = emulated.sample(logits, seeds, pos, **options), sample(logits, seeds, pos, **options)
        assert_same((mine[0], mine[2], mine[2], mine[1], mine[2]), (truth[0], truth[2], truth[2], truth[1], truth[2]))

    agrees()


def drafts_of(form: str, logits: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Likely drafts, now and then a missing or an impossible one, with the laws they may come from."""
    n, vocab = logits.shape
    x = logits.float().nan_to_num(-9.0, 9.0, -9.0).clamp(-9, 9)
    drafts = (x + torch.randn(n, vocab)).argmax(1)
    strange = torch.rand(n)
    drafts = torch.where(strange < 0.06, -1, torch.where(strange > 0.95, vocab, drafts)).to(INT)
    if form == "sparse":
        m = min(vocab, 6)
        probs, ids = (x + torch.randn(n, vocab)).softmax(1).topk(m)
        ids = torch.where(torch.rand(n, m) < 0.1, -1, ids).to(INT)
        ids[:, 0] = drafts
        return drafts, {"draft_ids": ids, "draft_probs": probs / probs.sum(1, keepdim=True)}
    if form == "dense":
        return drafts, {"draft_logits": (x + torch.randn(n, vocab)).to(torch.bfloat16)}
    if form == "reduced":  # several columns are one token, and some are none
        words = torch.randint(-1, vocab + 1, (vocab * 2 // 3 + n,), dtype=INT)
        words[-n:] = drafts
        columns = torch.cat([x, x[:, :1]], 1)[:, words.long()]
        return drafts, {"draft_logits": columns + torch.randn(columns.shape), "draft_vocab": words}
    return drafts, {}


@pytest.mark.parametrize("mode, form", [
    ("greedy", ""), ("coupled", ""), ("token", "one-hot"), ("token", "sparse"), ("token", "dense"),
    ("block", "one-hot"), ("block", "sparse"), ("block", "dense"), ("relaxed", ""), ("typical", ""),
    ("token", "reduced"), ("block", "reduced"),
])  # fmt: skip
def test_verify_agrees_with_the_cpu_kernel(mode, form):
    @few
    @given(vocabularies, st.sampled_from(emulated.DTYPES), filters, st.booleans(), st.booleans(), st.integers(0, 99))
    def agrees(vocab, dtype, option, edited, padded, seed):
        torch.manual_seed(seed)
        emulated.reversed_threads = seed % 2 == 1
        cu, k = [0, 4, 4, 5, 7], 2 + seed % 2  # a request without rows, one without drafts, one longer than K + 1
        logits, (seeds, pos) = rows(7, vocab, dtype, padded), test_sample.keys(4, seed)
        drafts, law = drafts_of(form, logits)
        call = {
            "mode": mode, "max_drafts": k, "eos_ids": torch.tensor([3, 4000], dtype=INT), **law,
            **test_sample.params(4, **option), **(edits(7, vocab) if edited else {}),
        }  # fmt: skip
        if mode in ("relaxed", "typical"):
            call |= {"allow_lossy": True, "relaxed_top_k": 3, "relaxed_delta": 0.2}
        if "draft_logits" in law:
            call["draft_temperature"] = torch.tensor([1.0, 0.0, 0.7, 2.0])
        args = logits, drafts, torch.tensor(cu, dtype=INT), seeds, pos
        mine = emulated.verify(*args, **call)
        with use_backend("cpu"):
            assert_same(mine, verify(*args, **call))

    agrees()


@pytest.mark.parametrize("option", [
    {"top_p": 0.9}, {"top_p": 0.3}, {"top_k": 700, "top_p": 0.6}, {"top_k": 20, "top_p": 0.8},
    {"min_p": 0.02, "top_p": 0.5}, {"top_k": 40, "min_p": 0.1}, {"top_k": 9000, "top_p": 0.999, "temperature": 3.0},
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT], ids=str)
def test_the_cut_is_the_cpu_kernels(option, dtype):
    """The log-probability tells the mass of what stays, of rows with and without many candidates."""
    logits = (torch.tensor([[4.0], [0.5]]) * torch.randn(2, 9001)).to(dtype)
    (seeds, pos), options = test_sample.keys(2), test_sample.params(2, **option)
    mine, truth = emulated.sample(logits, seeds, pos, **options), sample(logits, seeds, pos, **options)
    assert torch.equal(mine[0], truth[0])
    torch.testing.assert_close(mine[1], truth[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("option", [{"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 20}])
def test_bits_depend_on_neither_alignment_nor_type(option):
    logits, (seeds, pos) = (3 * torch.randn(2, 9001)).to(torch.bfloat16), test_sample.keys(2)
    want = emulated.sample(logits, seeds, pos, **test_sample.params(2, **option))
    moved = torch.nn.functional.pad(logits, (1, 6))[:, 1:9002]
    for other in (moved, logits.to(FLOAT)):
        got = emulated.sample(other, seeds, pos, **test_sample.params(2, **option))
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("kind", ["plain", "ties", "equal"])
@pytest.mark.parametrize("vocab, max_ids", [(1, 5), (50, 64), (4097, 64), (9001, 3), (40000, 64)])
def test_draft_sample_agrees_with_the_cpu_kernel(vocab, max_ids, kind):
    logits = {"plain": rows(3, vocab, FLOAT, True), "equal": torch.ones(3, vocab)}.get(kind)
    if kind == "ties":  # the last entries are the lowest tokens of many equals, in many sub-tiles
        logits = torch.randint(-3, 2, (3, vocab)).to(torch.bfloat16)
        logits[:, torch.randint(vocab, (20,))] += 1
    (seeds, pos), options = test_sample.keys(3, vocab), test_sample.params(3, temperature=[1.0, 0.3, 4.0])
    mine = emulated.draft_sample(logits, seeds, pos, max_ids=max_ids, **options)
    truth = draft_sample(logits, seeds, pos, max_ids=max_ids, **options)
    assert torch.equal(mine[0], truth[0]) and torch.equal(mine[1], truth[1])
    torch.testing.assert_close(mine[2], truth[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode, form", [
    ("token", "one-hot"), ("token", "sparse"), ("token", "dense"), ("block", "sparse"), ("block", "dense"),
    ("token", "reduced"), ("block", "reduced"),
])  # fmt: skip
@pytest.mark.parametrize("accept", [0.02, 0.999])
def test_final_draws_over_all_tiles(mode, form, accept):
    """From what is left, and from the row behind the draft, for uniforms from end to end."""
    b, vocab = 10, 9001
    logits = torch.randn(2, vocab).repeat(b, 1)
    drafts, law = drafts_of(form, logits[:2])
    drafts[0] = logits[0].argmax()
    law = {name: t if name == "draft_vocab" else t.repeat(b, 1) for name, t in law.items()}
    if form == "sparse":
        law["draft_ids"][:, 0], law["draft_probs"][:, 0] = drafts.repeat(b), 0.3
    uniforms = torch.full((b, 2, 2), accept, dtype=torch.float64)
    uniforms[:, :, 1] = ((torch.arange(b) + 0.5) / b)[:, None]
    zeros, cu_rows = torch.zeros(b, dtype=LONG), torch.arange(0, 2 * b + 1, 2, dtype=INT)
    args = logits, drafts.repeat(b).contiguous(), cu_rows, zeros, zeros
    call = {"mode": mode, "max_drafts": 1, "uniforms": uniforms.view(-1, 2), **law}
    mine, truth = emulated.verify(*args, **call), verify(*args, **call)
    assert_same(mine, truth)
    assert len(set((truth[0][torch.arange(b), truth[1].long() - 1] // 4096).tolist())) == 3, "every tile is drawn from"


@pytest.mark.parametrize("mode, form", [("greedy", ""), ("coupled", ""), ("token", "one-hot"), ("token", "sparse")])
def test_verify_tree_agrees_with_the_cpu_kernel(mode, form):
    @few
    @given(vocabularies, st.sampled_from(emulated.DTYPES), filters, st.booleans(), st.booleans(), st.integers(0, 99))
    def agrees(vocab, dtype, option, edited, padded, seed):
        torch.manual_seed(seed)
        emulated.reversed_threads = seed % 2 == 1
        cu = [0, 7, 7, 8, 12]
        logits, (seeds, pos) = rows(12, vocab, dtype, padded), test_sample.keys(4, seed)
        nodes, law = drafts_of(form, logits)
        if form:  # children have the likely tokens of their parent's row
            nodes = nodes.roll(1)
        parents = torch.tensor([-1, 0, 0, 0, 1, 2, 2, -1, 5, 0, 0, 1], dtype=INT)
        for child in range(1, 7):
            nodes[child] = drafts_of("", logits)[0][parents[child]] if seed % 3 else nodes[child]
        call = {
            "mode": mode, "max_depth": 1 + seed % 3, "eos_ids": torch.tensor([3, 4000], dtype=INT), **law,
            **test_sample.params(4, **option), **(edits(12, vocab) if edited else {}),
        }  # fmt: skip
        args = logits, nodes, parents, torch.tensor(cu, dtype=INT), seeds, pos
        mine = emulated.verify_tree(*args, **call)
        with use_backend("cpu"):
            assert_same(mine, verify_tree(*args, **call))

    agrees()


@pytest.mark.parametrize("form", ["one-hot", "sparse"])
@pytest.mark.parametrize("mode", ["token", "block", "tree"])
def test_many_uniforms_of_flat_laws(mode, form):
    """Rejections at every draft and sibling."""
    b, n, vocab = 40, 4, 6
    logits, zeros = torch.randn(b * n, vocab) / 2, torch.zeros(b, dtype=LONG)
    drafts = torch.randint(vocab, (b * n,), dtype=INT)
    law = {}
    if form == "sparse":
        law = {"draft_ids": torch.arange(vocab, dtype=INT).repeat(b * n, 1),
               "draft_probs": torch.randn(b * n, vocab).softmax(1)}  # fmt: skip
    call = {"uniforms": torch.rand(b * n, 2, dtype=torch.float64), **law}
    cu_rows = torch.arange(0, b * n + 1, n, dtype=INT)
    if mode == "tree":
        args = logits, drafts, torch.tensor([-1, 0, 0, 0], dtype=INT).repeat(b), cu_rows, zeros, zeros
        call |= {"mode": "token", "max_depth": 2}
        assert_same(emulated.verify_tree(*args, **call), verify_tree(*args, **call))
    else:
        args = logits, drafts, cu_rows, zeros, zeros
        call |= {"mode": mode, "max_drafts": n - 1}
        assert_same(emulated.verify(*args, **call), verify(*args, **call))
