"""The forward pass equals transformers' NemotronHForCausalLM on the same weights, loaded from the same files."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

from n3kernels.nemotron import Config, load

transformers = pytest.importorskip("transformers", minversion="5.17", reason="compares with transformers >= 5.17")

OPS = ("ssd_scan", "causal_conv1d", "mamba2_prefill", "mamba2_decode", "gated_rms_norm", "moe_route", "moe_experts")
SMALL = {
    "vocab_size": 97, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 80, "mamba_num_heads": 6, "mamba_head_dim": 8, "ssm_state_size": 16, "n_groups": 2,
    "conv_kernel": 4, "chunk_size": 16, "n_routed_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 40, "routed_scaling_factor": 2.5,
}  # fmt: skip
CASES = {
    "every kind of layer": {"hybrid_override_pattern": "ME*-M"},
    "latent experts": {"hybrid_override_pattern": "MEM*E", "moe_latent_size": 16},
    "expert groups": {"hybrid_override_pattern": "EM*E", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4},
    "one B/C group, wide conv": {"hybrid_override_pattern": "MM-*", "n_groups": 1, "conv_kernel": 3},
    "as many groups as heads": {"layers_block_type": ["mamba", "attention", "mlp"], "n_groups": 6},
    "no norm of the routing weights": {"hybrid_override_pattern": "E*", "norm_topk_prob": False},
}


def both(folder, changes):
    """A random transformers model, saved, and ours loaded from its files."""
    raw = {**SMALL, **changes}
    if "layers_block_type" in raw:
        names = {"mamba": "linear_attention", "attention": "full_attention"}
        raw["layers_block_type"] = [names.get(kind, kind) for kind in raw["layers_block_type"]]
    torch.manual_seed(1)
    hf = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**raw)).eval()
    with torch.no_grad():  # weights far from their initialisation: biases, D and norms matter
        for name, parameter in hf.named_parameters():
            if parameter.dim() == 1 and "A_log" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.dim() > 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in hf.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.copy_(0.1 * torch.randn_like(buffer))
    for module in hf.modules():
        # transformers clamps dt to at least 0.001 in its prefill alone; the released code does not (docs/mamba.md)
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    hf.save_pretrained(folder)
    return hf.to(DEVICE), load(folder, dtype=torch.float32, device=DEVICE)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(tmp_path, case):
    hf, ours = both(tmp_path, CASES[case])
    ids = torch.randint(SMALL["vocab_size"], (2, 41), device=DEVICE)
    with torch.no_grad():
        want, got = hf(ids).logits, ours(ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["every kind of layer", "latent experts"])
def test_decode_equals_transformers(tmp_path, case):
    """Prefill in two pieces, then token by token: the logits of the whole sequence at once."""
    hf, ours = both(tmp_path, CASES[case])
    ids = torch.randint(SMALL["vocab_size"], (1, 40), device=DEVICE)
    with torch.no_grad():
        want = hf(ids).logits
        cache, got = ours.cache(1, 40), []
        for piece in (ids[:, :17], ids[:, 17:30]):
            cache.prefill(0)
            got.append(ours(piece, cache))
            cache.commit([piece.shape[1]])
        for t in range(30, 40):
            cache.decode(1)
            got.append(ours(ids[:, t : t + 1], cache))
            cache.commit([1])
    torch.testing.assert_close(torch.cat(got, 1), want, rtol=1e-4, atol=1e-4)


def test_gradients_equal_transformers(tmp_path):
    hf, ours = both(tmp_path, CASES["latent experts"])
    ours.requires_grad_(True)
    ids = torch.randint(SMALL["vocab_size"], (2, 24), device=DEVICE)
    for model, logits in ((hf, lambda: hf(ids).logits), (ours, lambda: ours(ids))):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits().flatten(0, 1), ids.flatten()).backward()
    theirs = dict(hf.named_parameters())
    for name, parameter in ours.named_parameters():
        want = theirs["model." + name.removeprefix("backbone.") if name.startswith("backbone.") else name].grad
        error = (parameter.grad - want).norm() / want.norm()
        assert error <= 1e-4, f"{name}: relative error of the gradient {error:.2e}"


def test_config_round_trip():
    config = Config.from_dict({**SMALL, **CASES["latent experts"], "num_nextn_predict_layers": 1})
    assert Config.from_dict(config.to_dict()) == config
    assert transformers.NemotronHConfig(**config.to_dict()).hybrid_override_pattern == "MEM*E"
