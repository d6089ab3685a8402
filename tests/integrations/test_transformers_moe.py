"""The experts implementation "n3" for mixtures of experts of transformers that have no Mamba layers."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

from n3kernels.integrations import transformers_moe

transformers = pytest.importorskip("transformers", minversion="5.17", reason="needs the experts interface")

SHARED = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24}
SHARED |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
CONFIGS = {  # gated SiLU, softmax; sigmoid with a bias and groups; biases, transposed and interleaved: not served
    "Mixtral": {**SHARED, "num_local_experts": 6},
    "Qwen3Moe": {**SHARED, "num_experts": 6, "decoder_sparse_step": 1, "head_dim": 8},
    "DeepseekV3": {
        **SHARED, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0, "kv_lora_rank": 16,
        "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "GptOss": {**SHARED, "num_local_experts": 4, "head_dim": 8},
}  # fmt: skip
SERVED = ("Mixtral", "Qwen3Moe", "DeepseekV3")


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    torch.manual_seed(0)
    transformers_moe.register()
    built = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**CONFIGS[name])).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built.to(DEVICE)


def ids() -> torch.Tensor:
    return torch.randint(3, 97, (2, 19), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def run(model, implementation: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], set[str]]:
    """Logits, gradients, and the n3 operators that ran."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = model(input_ids=ids(), labels=ids())
        out.loss.backward()
    ops = {event.key for event in profile.key_averages() if event.key.startswith("n3::")}
    return out.logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, ops


def test_logits_and_gradients_are_those_of_eager(model, name):
    logits, gradients, _ = run(model, "eager")
    ours, our_gradients, ops = run(model, "n3")
    assert ("n3::moe_experts" in ops) == (name in SERVED)
    assert (ours - logits).norm() <= 1e-4 * logits.norm()
    assert gradients.keys() == our_gradients.keys()
    for parameter, gradient in gradients.items():
        assert (our_gradients[parameter] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, parameter


@pytest.mark.parametrize("name", SERVED, indirect=True)
def test_bfloat16_is_no_further_from_float32(model):
    with torch.no_grad():
        exact = model(input_ids=ids()).logits
        model.bfloat16().set_experts_implementation("eager")
        theirs = model(input_ids=ids()).logits.float()
        model.set_experts_implementation("n3")
        ours = model(input_ids=ids()).logits.float()
    assert (ours - exact).norm() < 2 * (theirs - exact).norm()


def test_autocast_multiplies_in_the_dtype_of_the_weights():
    torch.manual_seed(0)
    transformers_moe.register()
    config = transformers.MixtralConfig(**CONFIGS["Mixtral"])
    model = transformers.MixtralForCausalLM(config).eval().bfloat16()
    model.set_experts_implementation("n3")
    experts = model.model.layers[0].mlp.experts
    x, ids = torch.randn(3, 32), torch.tensor([[0, 1], [2, 3], [5, 6]])  # 6: an expert of another rank
    y = experts(x, ids, torch.ones(3, 2))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y[2], experts(x, ids[:, :1], torch.ones(3, 1))[2])
