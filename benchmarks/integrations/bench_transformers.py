"""A NemotronH of transformers, unpatched and after `n3kernels.integrations.transformers.enable()`.

Hidden 1024, Mamba heads as Nano's (64 wide, state 128), latent experts in Super's proportions, one attention
layer; random weights, float32 and bfloat16. Prefill of 512 tokens, with all logits and with the last ones as generation
asks for them, and generation of 32 tokens from a short prompt.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import pytest
import torch

from n3kernels.integrations import transformers as n3

from ..conftest import DEVICE, sizes

OP = "transformers"
NEW_TOKENS = 32
if not importlib.util.find_spec("transformers"):
    pytest.skip("transformers is not installed", allow_module_level=True)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@lru_cache(1)
def model(size: str, form: str = "fp32"):
    from transformers import NemotronHConfig, NemotronHForCausalLM

    small = size == "demo"
    hidden = 128 if small else 1024
    config = NemotronHConfig(
        vocab_size=1024 if small else 32768, hidden_size=hidden, hybrid_override_pattern="MEM*E",
        mamba_num_heads=2 * hidden // 64, mamba_head_dim=64, n_groups=2 if small else 8, ssm_state_size=128,
        num_attention_heads=hidden // 64, num_key_value_heads=2, head_dim=64, n_routed_experts=16 if small else 128,
        num_experts_per_tok=4 if small else 22, moe_latent_size=hidden // 4, moe_intermediate_size=96 if small else 672,
        moe_shared_expert_intermediate_size=1344 * hidden // 1024, routed_scaling_factor=5.0, use_cache=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return NemotronHForCausalLM(config).eval().to(DEVICE, DTYPES[form])


@pytest.fixture(params=["n3 function", "torch"])
def provider(request):
    yield request.param
    n3.disable()


def ids(length: int) -> torch.Tensor:
    return torch.randint(3, 1000, (1, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)


@pytest.mark.parametrize("logits", ["all", "last"])
@pytest.mark.parametrize("form", DTYPES)
@pytest.mark.parametrize("size", sizes(["demo", "hidden-1024"], quick=["demo"]))
def test_prefill(measure, size, form, logits, provider):
    net, x = model(size, form), ids(512)
    group = f"{OP} {size} {form} prefill 512, {logits} logits"

    def prefill(x):
        return net(x, use_cache=True, logits_to_keep=0 if logits == "all" else 1).logits

    measured(measure, provider, group, prefill, x, weight_bytes(net, 1.0), form)


@pytest.mark.parametrize("form", DTYPES)
@pytest.mark.parametrize("size", sizes(["demo", "hidden-1024"], quick=["demo"]))
def test_generate(measure, size, form, provider):
    net, x = model(size, form), ids(16)

    def generate(x):
        return net.generate(x, max_new_tokens=NEW_TOKENS, do_sample=False)

    share = net.config.num_experts_per_tok / net.config.n_routed_experts
    group = f"{OP} {size} {form} generate {NEW_TOKENS}"
    measured(measure, provider, group, generate, x, NEW_TOKENS * weight_bytes(net, share), form)


def weight_bytes(net, share: float) -> int:
    """Of all weights, ``share`` of the experts'."""
    sizes = ((name, p.numel() * p.element_size()) for name, p in net.named_parameters())
    return int(sum(n * (share if ".experts." in name else 1) for name, n in sizes))


def measured(measure, provider, group, fn, x, bytes, form):
    # Rounding in 16 bits may choose other experts for a token, and random weights another next token: in bfloat16 the
    # error is no check (in float32 it is, here and in tests/integrations).
    tolerance = 1e-4 if form == "fp32" else float("inf")
    n3.disable()
    with torch.inference_mode():
        truth = fn(x).double()
        if provider != "torch":
            n3.enable("nemotron_h")
        measure(OP, provider, fn, [x], truth, group=group, bytes=bytes, dtype=DTYPES[form], tolerance=tolerance)
