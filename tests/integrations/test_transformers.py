"""Models of transformers on n3 operators: the same logits, gradients and texts as without."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from torch import Tensor

from n3kernels.integrations import transformers as n3

transformers = pytest.importorskip("transformers", minversion="5.17", reason="patches transformers >= 5.17")

SHARED = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
SHARED |= {"bos_token_id": 1, "eos_token_id": 2}
MAMBA = {"mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_n_groups": 2, "mamba_chunk_size": 16}
CONFIGS = {
    "nemotron_h": ("NemotronH", {
        **SHARED, "head_dim": 8, "intermediate_size": 48, "mamba_num_heads": 6, "mamba_head_dim": 8, "n_groups": 2,
        "ssm_state_size": 16, "chunk_size": 16, "hybrid_override_pattern": "ME*-M", "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2,
    }),
    "nemotron_h, latent experts in groups": ("NemotronH", {
        **SHARED, "head_dim": 8, "mamba_num_heads": 6, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 16,
        "chunk_size": 16, "hybrid_override_pattern": "ME*E", "moe_intermediate_size": 24, "moe_latent_size": 16,
        "moe_shared_expert_intermediate_size": 24, "n_routed_experts": 12, "num_experts_per_tok": 5, "n_group": 4,
        "topk_group": 2, "routed_scaling_factor": 2.5,
    }),
    "mamba2": ("Mamba2", {
        "vocab_size": 97, "hidden_size": 32, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2,
        "num_hidden_layers": 2, "expand": 2, "chunk_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }),
    "bamba": ("Bamba", {
        **SHARED, **MAMBA, "mamba_n_heads": 8, "mamba_d_head": 8, "num_hidden_layers": 3, "intermediate_size": 48,
        "attn_layer_indices": [1],
    }),
    "zamba2": ("Zamba2", {
        **SHARED, "mamba_d_state": 16, "mamba_ngroups": 2, "n_mamba_heads": 8, "num_hidden_layers": 3, "chunk_size": 16,
        "intermediate_size": 48, "adapter_rank": 4, "num_key_value_heads": 4, "hybrid_layer_ids": [1],
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
    }),
    "granitemoehybrid": ("GraniteMoeHybrid", {
        **SHARED, **MAMBA, "mamba_n_heads": 8, "mamba_d_head": 8, "num_hidden_layers": 2, "intermediate_size": 48,
        "shared_intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "full_attention"],
    }),
    "falcon_h1": ("FalconH1", {
        **SHARED, **MAMBA, "mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_d_head": 8, "num_hidden_layers": 2,
        "intermediate_size": 48, "mamba_rms_norm": True, "mamba_norm_before_gate": False,
    }),
    "falcon_h1, gate behind the norm": ("FalconH1", {
        **SHARED, **MAMBA, "mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_d_head": 8, "num_hidden_layers": 2,
        "intermediate_size": 48, "mamba_rms_norm": True, "mamba_norm_before_gate": True,
    }),
    "falcon_h1, no norm": ("FalconH1", {
        **SHARED, **MAMBA, "mamba_d_ssm": 48, "mamba_n_heads": 6, "mamba_d_head": 8, "num_hidden_layers": 2,
        "intermediate_size": 48, "mamba_rms_norm": False,
    }),
}  # fmt: skip


@pytest.fixture(autouse=True)
def restored():
    yield
    n3.disable()


@pytest.fixture(params=CONFIGS)
def model(request):
    name, config = CONFIGS[request.param]
    torch.manual_seed(0)
    built = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config)).eval()
    with torch.no_grad():  # away from the initialisation, where norms, D and biases do nothing
        for parameter_name, parameter in built.named_parameters():
            if "A_log" not in parameter_name:
                parameter.add_((0.3 if parameter.dim() == 1 else 0.1) * torch.randn_like(parameter))
    return built.to(DEVICE)


def ids(batch: int = 2, length: int = 37) -> Tensor:
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def logits(model, **inputs) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits.float()


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def on_n3(run, *ops):
    """``run()`` with n3 enabled; every one of these operators must have been called."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        n3.enable()
        result = run()
    called = {event.key for event in profile.key_averages()}
    assert {f"n3::{op}" for op in ops} <= called, called
    n3.disable()
    return result


def experts_of(model, *ops: str) -> tuple[str, ...]:
    return ops if getattr(model.config, "num_experts_per_tok", 0) and model.config.model_type != "mamba2" else ()


def test_logits(model):
    inputs = {"input_ids": ids()}
    plain = logits(model, **inputs)
    ops = "causal_conv1d", "ssd_scan", *experts_of(model, "moe_route", "moe_experts")
    assert error(on_n3(lambda: logits(model, **inputs), *ops), plain) < 1e-4
    assert torch.equal(logits(model, **inputs), plain), "disable() did not restore"


def test_logits_of_a_padded_batch(model):
    mask = torch.ones(2, 37, dtype=torch.int64, device=DEVICE)
    mask[0, :9] = 0
    inputs = {"input_ids": ids(), "attention_mask": mask}
    plain = logits(model, **inputs)
    assert error(on_n3(lambda: logits(model, **inputs))[mask.bool()], plain[mask.bool()]) < 1e-4


def test_bfloat16_is_no_further_from_float32(model):
    inputs = {"input_ids": ids()}
    exact, narrow = logits(model, **inputs), model.bfloat16()
    theirs, ours = logits(narrow, **inputs), on_n3(lambda: logits(narrow, **inputs))
    assert error(ours, exact) < 2 * error(theirs, exact)


def test_gradients(model):
    model.train()

    def gradients():
        model.zero_grad()
        model(input_ids=ids(), labels=ids()).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    ours = on_n3(gradients, "ssd_scan_bwd", "causal_conv1d_bwd", *experts_of(model, "moe_experts_bwd"))
    assert plain.keys() == ours.keys()
    for name, gradient in plain.items():
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, name


def test_generation(model):
    def generate():
        mask = torch.ones_like(ids())
        mask[0, :5] = 0
        return model.generate(ids(), attention_mask=mask, max_new_tokens=12, do_sample=False)

    plain = generate()
    ours = on_n3(generate, "ssm_update", "causal_conv1d_update")
    assert torch.equal(ours, plain)


def test_prefill_in_pieces(model):
    def run():
        cache, parts = None, []
        for piece in ids().split([20, 1, 16], dim=1):
            with torch.no_grad():
                out = model(input_ids=piece, past_key_values=cache, use_cache=True)
            cache = getattr(out, "past_key_values", None) or getattr(out, "cache_params", None)
            parts.append(out.logits)
        return torch.cat(parts, 1)

    if model.config.model_type == "mamba2":
        pytest.skip("transformers' Mamba2ForCausalLM takes its cache under another name")
    assert error(on_n3(run), run()) < 1e-4


# ---------------------------------------------------------------- what is changed


def test_one_architecture_is_enough():
    from transformers.models.bamba import modeling_bamba
    from transformers.models.mamba2 import modeling_mamba2

    theirs = modeling_bamba.causal_conv1d_fn
    assert n3.enable(transformers.Mamba2ForCausalLM) == ["mamba2"]
    assert modeling_mamba2.causal_conv1d_fn.__module__ == "n3kernels.integrations.transformers"
    assert modeling_bamba.causal_conv1d_fn is theirs
    assert n3.enable("bamba") == ["bamba"]
    n3.disable()
    assert modeling_bamba.causal_conv1d_fn is theirs


def test_subclasses_and_wrapped_models():
    class Mine(transformers.Mamba2ForCausalLM):
        pass

    assert n3.enable(Mine) == ["mamba2"]
    assert n3.enable("mamba2") == []
    n3.disable()
    config = transformers.Mamba2Config(
        vocab_size=8, hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16, state_size=8, n_groups=1
    )
    adapted = torch.nn.ModuleDict({"base_model": Mine(config)})
    assert n3.enable(adapted) == ["mamba2"]
    with pytest.raises(ValueError, match="no Mamba-2 layers"):
        n3.enable(torch.nn.Linear(2, 2))


def test_float64(model):
    """Which transformers' own grouped products refuse."""
    inputs = {"input_ids": ids()}
    expected = logits(model, **inputs)
    n3.enable(model)
    assert error(logits(model.double(), **inputs), expected) < 1e-4


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="no Mamba-2 layers of transformers in 'llama'"):
        n3.enable(transformers.LlamaForCausalLM)
