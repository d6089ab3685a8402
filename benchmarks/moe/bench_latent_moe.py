"""The whole LatentMoE layer against transformers' NemotronHMoE: eager (a loop over experts) and grouped_mm."""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from n3kernels.moe import latent_moe

from ..conftest import DEVICE, sizes
from ..shapes import LAYERS, Layer

OP = "latent_moe"
TOKENS = (1, 8, 64, 256)
BASELINES = ["torch, eager", "torch, grouped_mm"] if importlib.util.find_spec("transformers") else []


def weights(layer: Layer) -> dict[str, Tensor]:
    """Under the names of transformers' module."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE) / shape[-1] ** 0.5

    latent = layer.latent or layer.hidden
    w = {"gate.weight": normal(layer.experts, layer.hidden),
         "experts.up_proj": normal(layer.experts, layer.inner, latent),
         "experts.down_proj": normal(layer.experts, latent, layer.inner),
         "shared_experts.up_proj.weight": normal(layer.shared, layer.hidden),
         "shared_experts.down_proj.weight": normal(layer.hidden, layer.shared)}  # fmt: skip
    if layer.latent:
        w["fc1_latent_proj.weight"] = normal(latent, layer.hidden)
        w["fc2_latent_proj.weight"] = normal(layer.hidden, latent)
    return w


class Problem:
    def __init__(self, size: str, tokens: int, dtype: torch.dtype):
        self.layer = LAYERS[size]
        full = weights(self.layer)
        self.x = torch.randn(tokens, self.layer.hidden, device=DEVICE, dtype=dtype)
        self.weights = {name: w if name == "gate.weight" else w.to(dtype) for name, w in full.items()}
        self.args = (self.x, *self.weights.values())
        wide = (t.double() for t in self.args)
        self.truth = ours(self.layer)(*wide)
        k, inner, latent = self.layer.top_k, self.layer.inner, self.layer.latent or self.layer.hidden
        active = self.layer.experts * (1 - (1 - k / self.layer.experts) ** tokens)
        fixed = sum(w.numel() for name, w in self.weights.items() if not name.startswith("experts."))
        self.bytes = int((fixed + active * 2 * inner * latent) * dtype.itemsize)
        self.flops = 2 * tokens * (fixed + k * 2 * inner * latent)


def ours(layer: Layer):
    def run(x, gate, up, down, shared_up, shared_down, fc1=None, fc2=None):
        return latent_moe(
            x, gate, None, up, down, shared_up, shared_down, fc1, fc2, top_k=layer.top_k, scale=layer.scale
        )

    return run


def theirs(problem: Problem, implementation: str):
    """transformers' module as a function of its weights."""
    from transformers import NemotronHConfig
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMoE

    layer = problem.layer
    config = NemotronHConfig(
        hidden_size=layer.hidden, n_routed_experts=layer.experts, num_experts_per_tok=layer.top_k,
        moe_intermediate_size=layer.inner, moe_latent_size=layer.latent, routed_scaling_factor=layer.scale,
        moe_shared_expert_intermediate_size=layer.shared, hybrid_override_pattern="E",
    )  # fmt: skip
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = NemotronHMoE(config)
    module.gate.e_score_correction_bias = torch.zeros(layer.experts, device=DEVICE)
    module.load_state_dict(problem.weights, strict=False, assign=True)
    parameters = [module.get_parameter(name) for name in problem.weights]

    def run(x, *weights):
        for parameter, w in zip(parameters, weights, strict=True):
            parameter.data = w
        return module(x)

    return run


problem = lru_cache(1)(Problem)  # the providers of a group come one after the other and share it


@pytest.mark.parametrize("provider", ["n3 function", *BASELINES])
@pytest.mark.parametrize("tokens", sizes(TOKENS, quick=[8]))
@pytest.mark.parametrize("dtype", sizes([torch.float32, torch.bfloat16], quick=[torch.float32]), ids=str)
@pytest.mark.parametrize("size", sizes(LAYERS, quick=["demo"], full=["nano", "super"]))
def test_latent_moe(measure, size, dtype, tokens, provider):
    p = problem(size, tokens, dtype)
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    fn = ours(p.layer) if provider == "n3 function" else theirs(p, provider.removeprefix("torch, "))
    with torch.inference_mode():
        measure(
            OP, provider, fn, p.args, p.truth,
            group=f"{OP} {size} {short} T={tokens}", flops=p.flops, bytes=p.bytes,
            tolerance=1e-5 if dtype == torch.float32 else 3e-2,  # which rounds after every step
        )  # fmt: skip
