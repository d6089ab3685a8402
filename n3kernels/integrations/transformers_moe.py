"""Experts and routers of transformers on n3 operators; `transformers.enable` puts them where they belong.

`experts_forward` is registered as the experts implementation ``"n3"``, which any mixture of experts in transformers can
be given, Mamba or not: ``model.set_experts_implementation("n3")``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["EXPERTS", "ROUTERS", "experts_forward", "granite_router", "nemotron_router", "register"]

NAME = "n3"
EXPERTS = {"nemotron_h": "NemotronHExperts", "granitemoehybrid": "GraniteMoeHybridExperts"}


def register() -> None:
    """Makes ``experts_implementation="n3"`` known to transformers; calling it again does no harm."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """``n3::moe_experts`` for an experts module of transformers; transformers' own grouped product where it differs.

    Its own serves biases, norms behind the experts, transposed or interleaved weights, activations other than relu2,
    gated SiLU and gated (erf) GELU, and weights that are no plain floating-point tensors.
    """
    activation = activation_of(self)
    if activation is None:
        from transformers.integrations.moe import grouped_mm_experts_forward

        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    w_up = self.gate_up_proj if self.has_gate else self.up_proj
    y = torch.ops.n3.moe_experts(
        hidden_states.to(w_up.dtype), w_up, self.down_proj, top_k_index.int(),
        top_k_weights.to(torch.promote_types(w_up.dtype, torch.float32)), activation=activation,
    )  # fmt: skip
    return y.to(hidden_states.dtype)


def activation_of(experts: nn.Module) -> str | None:
    """The operator's name for what the module does between its products; None where the operator has none."""
    from transformers.integrations.moe import _default_apply_gate

    if experts.has_bias or experts.has_post_expert_norm or experts.is_transposed or not experts.is_concatenated:
        return None
    w_up = experts.gate_up_proj if experts.has_gate else experts.up_proj
    if type(w_up) not in (Tensor, nn.Parameter) or not w_up.is_floating_point() or w_up.element_size() == 1:
        return None
    name = _ACTIVATIONS.get(type(experts.act_fn).__name__)
    if name == "gelu" and getattr(experts.act_fn, "approximate", "none") != "none":
        return None
    if not experts.has_gate:
        return name if name == "relu2" else None
    return name if name != "relu2" and type(experts)._apply_gate is _default_apply_gate else None


_ACTIVATIONS = {
    "ReLUSquaredActivation": "relu2", "SiLU": "silu", "SiLUActivation": "silu", "GELU": "gelu", "GELUActivation": "gelu"
}  # fmt: skip


def nemotron_router(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = F.linear(hidden_states.view(-1, self.hidden_dim).float(), self.weight.float())
    ids, weights, _, _ = torch.ops.n3.moe_route(
        logits, self.e_score_correction_bias.float(), top_k=self.top_k, n_group=self.num_group,
        topk_group=self.topk_group, normalize=self.norm_topk_prob, scale=self.routed_scaling_factor,
    )  # fmt: skip
    return logits, weights, ids.long()


def granite_router(self: nn.Module, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Softmax over the chosen logits is softmax over all of them, normalised over the chosen.
    logits = F.linear(hidden_states, self.weight).float()
    ids, weights, _, _ = torch.ops.n3.moe_route(logits, top_k=self.top_k, score="softmax")
    return logits, weights.type_as(hidden_states), ids.long()


ROUTERS: dict[str, tuple[str, Callable[..., Any]]] = {
    "nemotron_h": ("NemotronHTopkRouter", nemotron_router),
    "granitemoehybrid": ("GraniteMoeHybridTopKRouter", granite_router),
}
