"""Speculative decoding gives the text of plain decoding, token for token, and batches do not change it."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE, assert_invariant
from small_model import CONFIG, random_model

from n3kernels import batch_invariant, explain
from n3kernels.mtp import ThinkingBudget
from n3kernels.nemotron import generate, load, save
from n3kernels.nemotron.layers import one_by_one
from n3kernels.tiny import NEWLINE, THINK, THINK_END

PROMPTS = ([1, 100, 164], [319], [1, 97, 98, 99, 100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111, 112, 113])
SAMPLED = {"temperature": 0.9, "top_k": 50, "top_p": 0.95, "min_p": 0.01}


@pytest.fixture(scope="module")
def model():
    return random_model().to(DEVICE)


@pytest.fixture(scope="module")
def obliging(model):
    """A model whose drafts are often right: its MTP layer and blocks add little to the embedding of the last token."""
    net = random_model().to(DEVICE)
    for block in [*net.backbone.layers, *net.mtp.layers]:
        for name, parameter in block.mixer.named_parameters():
            if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight", "down_proj")):
                parameter.mul_(0.05)
    eh = net.mtp.layers[0].eh_proj.weight
    eh.zero_()[:, : CONFIG.hidden_size] += torch.eye(CONFIG.hidden_size, device=DEVICE)
    return net


# ---------------------------------------------------------------- drafts do not change the text


@pytest.mark.parametrize("drafts", [1, 3, 5])
@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "coupled"])
def test_drafts_do_not_change_the_text(model, options, drafts):
    plain = generate(model, PROMPTS, 12, seed=[5, 6, 7], stop_ids=(), **options)
    result = generate(model, PROMPTS, 12, seed=[5, 6, 7], stop_ids=(), drafts=drafts, **options)
    assert result.tokens == plain.tokens
    assert [len(tokens) for tokens in result.tokens] == [12, 12, 12]


@pytest.mark.parametrize("drafts", [1, 3, 5])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.2}], ids=["greedy", "coupled"])
def test_accepted_drafts_do_not_change_it_either(obliging, options, drafts):
    plain = generate(obliging, PROMPTS, 20, stop_ids=(), **options)
    result = generate(obliging, PROMPTS, 20, stop_ids=(), drafts=drafts, **options)
    assert result.tokens == plain.tokens
    assert result.acceptance_length > 1.2 and result.emitted[-1] > 0  # some steps accept every draft


def test_packed_weights(model, tmp_path):
    save(model, tmp_path, nvfp4=lambda name: "lm_head" not in name)
    packed = load(tmp_path, device=DEVICE)
    plain = generate(packed, PROMPTS, 8, stop_ids=())
    assert generate(packed, PROMPTS, 8, stop_ids=(), drafts=3).tokens == plain.tokens


def test_a_large_batch(model):
    """More rows per step than the forward pass takes one by one outside of `generate`."""
    prompts = [[1, 64 + i] for i in range(9)]
    plain = generate(model, prompts, 5, stop_ids=(), temperature=1.0)
    assert generate(model, prompts, 5, stop_ids=(), temperature=1.0, drafts=3).tokens == plain.tokens


MODES = {"token": {"mode": "token", **SAMPLED}, "block": {"mode": "block", "temperature": 0.7}}


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_drawn_drafts_are_accepted(obliging, options):
    result = generate(obliging, PROMPTS, 24, stop_ids=(), drafts=3, **options)
    assert [len(tokens) for tokens in result.tokens] == [24, 24, 24]
    assert result.acceptance_length > 1.2


@pytest.mark.parametrize("mode", ["token", "block"])
def test_at_temperature_0_every_mode_is_greedy(model, mode):
    plain = generate(model, PROMPTS, 8, stop_ids=())
    assert generate(model, PROMPTS, 8, stop_ids=(), drafts=2, mode=mode).tokens == plain.tokens


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("options", [{}, SAMPLED, *MODES.values()], ids=["greedy", "coupled", *MODES])
def test_a_request_does_not_see_the_others(model, options, drafts):
    """Alone, in company, in any order: the seed and the prompt alone decide the text."""
    seeds = [11, 12, 13]
    together = generate(model, PROMPTS, 6, drafts=drafts, seed=seeds, stop_ids=(), **options).tokens
    reverse = generate(model, PROMPTS[::-1], 6, drafts=drafts, seed=seeds[::-1], stop_ids=(), **options).tokens
    assert reverse[::-1] == together
    for prompt, seed, tokens in zip(PROMPTS, seeds, together, strict=True):
        assert generate(model, [prompt], 6, drafts=drafts, seed=seed, stop_ids=(), **options).tokens == [tokens]


def test_the_seed_decides(model):
    texts = [generate(model, PROMPTS[:1], 8, temperature=1.0, seed=seed, stop_ids=()).tokens[0] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


# ---------------------------------------------------------------- where a text ends


@pytest.mark.parametrize("drafts", [0, 2, 5])
@pytest.mark.parametrize("at", [0, 3, 7])
def test_stop_ids_end_a_text(model, drafts, at):
    free = generate(model, PROMPTS[:2], 12, temperature=1.0, seed=[1, 2], stop_ids=()).tokens
    stop = free[0][at]
    result = generate(model, PROMPTS[:2], 12, temperature=1.0, seed=[1, 2], stop_ids=(stop,), drafts=drafts).tokens
    for tokens, whole in zip(result, free, strict=True):
        assert tokens == whole[: whole.index(stop) + 1 if stop in whole else None]


def test_the_configuration_stops_by_default(model):
    free = generate(model, PROMPTS[:1], 4, stop_ids=()).tokens[0]
    net = random_model(eos_token_ids=(free[1],)).to(DEVICE)
    assert generate(net, PROMPTS[:1], 4).tokens[0] == free[: free.index(free[1]) + 1]


@pytest.mark.parametrize("most", [0, 1, 2, 5])
@pytest.mark.parametrize("drafts", [0, 4])
def test_max_tokens(obliging, most, drafts):
    whole = generate(obliging, PROMPTS, 8, stop_ids=()).tokens
    result = generate(obliging, PROMPTS, most, stop_ids=(), drafts=drafts)
    assert result.tokens == [tokens[:most] for tokens in whole]


def test_no_prompts(model):
    assert generate(model, [], 4, drafts=2).tokens == []


@pytest.mark.parametrize("budget", [0, 4, 9])
def test_thinking_budget(model, budget):
    """Thinking ends after the budget at the latest, with drafts as without, and the text goes on from there."""
    prompts = [[1, 100, THINK, NEWLINE], [1, 99, 98, THINK, NEWLINE], [1, 100]]  # the last does not think

    def run(drafts):
        thinking = ThinkingBudget(
            prompts, budget, end_ids=(NEWLINE, THINK_END), end_think_ids=((THINK_END,),),
            prompt_think_ids=(THINK, NEWLINE), newline_ids=(NEWLINE,), device=DEVICE,
        )  # fmt: skip
        return generate(
            model, prompts, 14, temperature=1.0, seed=[3, 4, 5], stop_ids=(), drafts=drafts, thinking=thinking
        ).tokens

    plain = run(0)
    for tokens in plain[:2]:
        # The model may have written the newline itself: then the overlap is not written twice.
        assert THINK_END in tokens[: budget + 2]
        assert tokens[tokens.index(THINK_END) - 1] == NEWLINE
    free = generate(model, prompts[2:], 14, temperature=1.0, seed=5, stop_ids=()).tokens
    assert plain[2:] == free
    for drafts in (1, 3, 5):
        assert run(drafts) == plain


@pytest.mark.parametrize("mode", ["coupled", "token", "block"])
def test_a_forced_string_comes_in_one_step(model, mode):
    """What is about to be forced is drafted, and accepted for certain."""
    end = (NEWLINE, 100, 101, THINK_END)
    thinking = ThinkingBudget(
        [[1, 100, THINK, NEWLINE]], 0, end_ids=end, end_think_ids=((THINK_END,),), prompt_think_ids=(THINK, NEWLINE),
        newline_ids=(NEWLINE,), device=DEVICE,
    )  # fmt: skip
    result = generate(
        model, [[1, 100, THINK, NEWLINE]], 4, temperature=1.0, stop_ids=(), drafts=3, thinking=thinking, mode=mode
    )
    assert tuple(result.tokens[0]) == end and result.emitted == [0, 0, 0, 0, 1]


# ---------------------------------------------------------------- what the promise rests on


def prefilled(model, batch, drafts=0):
    cache = model.cache(batch, 64, drafts)
    for b in range(batch):
        cache.prefill(b)
        model(torch.tensor([[1, 100 + b, 164]], device=DEVICE), cache)
        cache.commit([3])
    return cache


@pytest.mark.parametrize("batch, tokens", [(1, 2), (1, 6), (3, 4), (6, 4)])
@torch.inference_mode()
def test_verification_has_the_bits_of_decoding(model, batch, tokens):
    """The same bits from kernels; the references of the recurrence are excused as in `assert_invariant`."""
    backend = explain("mamba2_decode", device=DEVICE).backend
    ids = torch.randint(CONFIG.vocab_size, (batch, tokens), device=DEVICE)
    at_once, one_at_a_time = prefilled(model, batch, tokens - 1), prefilled(model, batch)
    with one_by_one(), batch_invariant():
        at_once.decode(tokens)
        logits = model(ids, at_once)
        at_once.commit([tokens] * batch)
        for t in range(tokens):
            one_at_a_time.decode(1)
            assert_invariant(backend, logits[:, t], model(ids[:, t : t + 1], one_at_a_time)[:, 0])
            one_at_a_time.commit([1] * batch)
        rows = torch.arange(batch, device=DEVICE) * at_once.slots + at_once.current
        for layer in (0, 4):
            assert_invariant(backend, at_once.ssm[layer][rows], one_at_a_time.ssm[layer])
            assert_invariant(backend, at_once.conv[layer][rows], one_at_a_time.conv[layer])


@torch.inference_mode()
def test_what_was_refused_leaves_no_trace(model):
    """After a verification that keeps one token of four, the next step has the logits of never having seen the rest."""
    ids = torch.randint(CONFIG.vocab_size, (2, 4), device=DEVICE)
    drafted, plain = prefilled(model, 2, 3), prefilled(model, 2)
    drafted.decode(4)
    model(ids, drafted)
    drafted.commit([1, 1])
    plain.decode(1)
    model(ids[:, :1], plain)
    plain.commit([1, 1])
    for cache in (drafted, plain):
        cache.decode(1)
    backend = explain("mamba2_decode", device=DEVICE).backend
    assert_invariant(backend, model(ids[:, 3:], drafted), model(ids[:, 3:], plain))


@pytest.mark.parametrize("pieces", [(20, 13), (1, 32), (32, 1), (5, 1, 17, 10), (16, 16, 1)])
@torch.inference_mode()
def test_prefill_in_pieces(model, pieces):
    ids = torch.randint(CONFIG.vocab_size, (1, 33), device=DEVICE)
    whole, cache, logits = model.cache(1, 33), model.cache(1, 33), []
    whole.prefill(0)
    want = model(ids, whole)
    for piece in ids.split(pieces, 1):
        cache.prefill(0)
        logits.append(model(piece, cache))
        cache.commit([piece.shape[1]])
    torch.testing.assert_close(torch.cat(logits, 1), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(ids), want, rtol=1e-4, atol=1e-5)
    for layer in (0, 4):
        torch.testing.assert_close(cache.ssm[layer], whole.ssm[layer], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- bad calls


@pytest.mark.parametrize("prompts, message", [
    ([[1], []], "prompt 1 must hold ids in [0, 320), got no ids"),
    ([[1, 320]], "prompt 0 must hold ids in [0, 320), got id 320"),
    ([[-1]], "prompt 0 must hold ids in [0, 320), got id -1"),
])  # fmt: skip
def test_bad_prompts(model, prompts, message):
    with pytest.raises(ValueError) as error:
        generate(model, prompts)
    assert str(error.value) == f"generate: {message}"


def test_an_unknown_mode(model):
    with pytest.raises(ValueError, match="mode must be one of coupled, token, block, got relaxed"):
        generate(model, [[1]], drafts=1, mode="relaxed")


def test_drafts_need_an_mtp_layer():
    net = random_model(mtp_layers=(), num_nextn_predict_layers=0)
    with pytest.raises(ValueError) as error:
        generate(net, [[1]], drafts=1)
    assert str(error.value) == "generate: drafts need a checkpoint with an MTP layer (num_nextn_predict_layers is 0)"
    assert len(generate(net, [[1]], 3, stop_ids=()).tokens[0]) == 3


def test_a_full_cache_says_so(model):
    cache = prefilled(model, 1)
    cache.prefill(0)
    with pytest.raises(ValueError, match="^Cache: 65 tokens do not fit max_length 64$"):
        model(torch.zeros(1, 62, dtype=torch.int64, device=DEVICE), cache)
    with pytest.raises(ValueError, match=r"^Cache.decode: tokens must be in 1...1, got 2$"):
        cache.decode(2)
