"""A random model of every kind of layer, with an MTP layer.

Its widths are multiples of 64, as in the released models: there, PyTorch's own vectorised functions, of which the
references are made, mostly round an element the same wherever it lies in memory.
"""

from __future__ import annotations

import dataclasses

import torch

from n3kernels.nemotron import Config, Nemotron
from n3kernels.tiny import BYTE0

CONFIG = Config(
    layers=("mamba", "moe", "attention", "mlp", "mamba"),
    mtp_layers=("attention", "moe"), num_nextn_predict_layers=1,
    vocab_size=BYTE0 + 256, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=64,
    intermediate_size=64, mamba_num_heads=2, mamba_head_dim=64, ssm_state_size=64, n_groups=1, conv_kernel=4,
    chunk_size=16, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, moe_latent_size=64,
    moe_shared_expert_intermediate_size=64, routed_scaling_factor=2.5,
)  # fmt: skip


def random_model(seed: int = 0, **changes) -> Nemotron:
    torch.manual_seed(seed)
    model = Nemotron(dataclasses.replace(CONFIG, **changes))
    model.init_weights(0.1)
    return model.eval().requires_grad_(False)
