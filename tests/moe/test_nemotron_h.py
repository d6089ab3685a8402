"""The layer as transformers has it, module by module: NemotronHTopkRouter, NemotronHExperts, NemotronHMoE."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from transformers import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts, NemotronHMoE, NemotronHTopkRouter

from n3kernels.moe import experts, latent_moe, route

# hidden, latent, experts, top_k, inner, shared inner, groups, kept groups, scale
CONFIGS = {
    "nano": (48, None, 16, 6, 40, 80, 1, 1, 2.5),
    "super": (64, 16, 32, 22, 48, 96, 1, 1, 5.0),
    "groups": (32, 8, 24, 4, 16, 24, 4, 2, 1.0),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    hidden, latent, num_experts, top_k, inner, shared, n_group, topk_group, scale = CONFIGS[request.param]
    return NemotronHConfig(
        hidden_size=hidden, moe_latent_size=latent, n_routed_experts=num_experts, num_experts_per_tok=top_k,
        moe_intermediate_size=inner, moe_shared_expert_intermediate_size=shared, n_group=n_group,
        topk_group=topk_group, routed_scaling_factor=scale, norm_topk_prob=True, mlp_hidden_act="relu2",
        mlp_bias=False, n_shared_experts=1, experts_implementation="eager",
    )  # fmt: skip


def randomised(module):
    for name, parameter in [*module.named_parameters(), *module.named_buffers()]:
        torch.nn.init.normal_(parameter, std=0.1 if "bias" in name else parameter.shape[-1] ** -0.5)
    return module.to(DEVICE)


def routed(gate, x, config):
    logits = torch.nn.functional.linear(x.float(), gate.weight.float())
    return route(
        logits, gate.e_score_correction_bias, top_k=config.num_experts_per_tok, n_group=config.n_group,
        topk_group=config.topk_group, scale=config.routed_scaling_factor,
    )  # fmt: skip


def layer(moe, x, config, **weights):
    named = {
        "router_weight": moe.gate.weight, "router_bias": moe.gate.e_score_correction_bias,
        "w_up": moe.experts.up_proj, "w_down": moe.experts.down_proj,
        "shared_up": moe.shared_experts.up_proj.weight, "shared_down": moe.shared_experts.down_proj.weight,
        "fc1": getattr(moe.fc1_latent_proj, "weight", None), "fc2": getattr(moe.fc2_latent_proj, "weight", None),
    }  # fmt: skip
    return latent_moe(
        x, **{**named, **weights}, top_k=config.num_experts_per_tok, n_group=config.n_group,
        topk_group=config.topk_group, normalize=config.norm_topk_prob, scale=config.routed_scaling_factor,
    )  # fmt: skip


def test_router(config):
    gate = randomised(NemotronHTopkRouter(config))
    x = torch.randn(50, config.hidden_size, device=DEVICE)
    logits, weights, ids = gate(x)
    our_ids, our_weights, _, flags = routed(gate, x, config)
    dense, ours = torch.zeros_like(logits), torch.zeros_like(logits)  # their ids come in no particular order
    torch.testing.assert_close(
        ours.scatter(1, our_ids.long(), our_weights), dense.scatter(1, ids, weights), rtol=1e-5, atol=1e-7
    )
    assert not flags.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts(config, dtype):
    module = randomised(NemotronHExperts(config)).to(dtype)
    x = torch.randn(50, module.up_proj.shape[2], device=DEVICE).to(dtype)
    logits = torch.randn(50, config.n_routed_experts, device=DEVICE)
    ids, weights, _, _ = route(logits, top_k=config.num_experts_per_tok)
    truth = module.double()(x.double(), ids.long(), weights.double())
    theirs = module.to(dtype)(x, ids.long(), weights)
    ours = experts(x, module.up_proj, module.down_proj, ids, weights)
    error, their_error = ((y.double() - truth).norm() / truth.norm() for y in (ours, theirs))
    assert error <= (3e-3 if dtype == torch.bfloat16 else 1e-6)
    assert error <= 2 * their_error


def test_layer(config):
    moe = randomised(NemotronHMoE(config))
    x = torch.randn(2, 9, config.hidden_size, device=DEVICE)
    torch.testing.assert_close(layer(moe, x, config), moe(x), rtol=1e-4, atol=1e-4)


def test_gradients(config):
    """Of the input and of every weight in float64, behind our router: theirs computes in float32 even then."""
    moe = randomised(NemotronHMoE(config)).double()
    x = torch.randn(2, 9, config.hidden_size, dtype=torch.double, device=DEVICE, requires_grad=True)
    grad_y = torch.randn_like(x)

    def gate(hidden):
        ids, weights, _, _ = route(
            hidden.flatten(0, -2) @ moe.gate.weight.t(), moe.gate.e_score_correction_bias.double(),
            top_k=config.num_experts_per_tok, n_group=config.n_group, topk_group=config.topk_group,
            scale=config.routed_scaling_factor,
        )  # fmt: skip
        return None, weights, ids.long()

    moe.gate.forward = gate
    leaves = [x, *moe.parameters()]
    theirs = torch.autograd.grad(moe(x), leaves, grad_y)
    ours = torch.autograd.grad(layer(moe, x, config), leaves, grad_y)
    torch.testing.assert_close(ours, theirs)


def test_router_gradients(config):
    gate = randomised(NemotronHTopkRouter(config))
    x = torch.randn(50, config.hidden_size, device=DEVICE, requires_grad=True)
    _, weights, ids = gate(x)
    our_ids, our_weights, _, _ = routed(gate, x, config)
    pattern = torch.randn(config.n_routed_experts, device=DEVICE)
    theirs = torch.autograd.grad((weights * pattern[ids]).sum(), (x, gate.weight))
    ours = torch.autograd.grad((our_weights * pattern[our_ids.long()]).sum(), (x, gate.weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
