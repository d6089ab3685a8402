"""The model: embedding, blocks, final norm, output head, and the multi-token-prediction layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .cache import Cache
from .config import Config
from .layers import Block, Linear, Mamba2, MoE, RMSNorm

__all__ = ["Nemotron"]


class Backbone(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.layers)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        x = self.embeddings(ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, cache, index)
        return self.norm_f(x)


class Mtp(nn.Module):
    """One drafting layer: ``eh_proj([enorm(embedding of token t+1), hnorm(hidden of t)])``, then its blocks.

    Its output is the hidden from which the target's own head predicts token t+2, and what stands for the backbone's
    hidden where it is applied again for the token after. It has no Mamba layer, hence no recurrent state.
    """

    def __init__(self, config: Config):
        super().__init__()
        d, eps = config.hidden_size, config.layer_norm_epsilon
        self.layers = nn.ModuleList(Block(config, kind) for kind in config.mtp_layers)
        first, last = self.layers[0], self.layers[-1]
        first.enorm, first.hnorm = RMSNorm(d, eps), RMSNorm(d, eps)
        first.eh_proj = Linear(2 * d, d)
        last.final_layernorm = RMSNorm(d, eps)

    def forward(self, embedded: Tensor, hidden: Tensor, cache: Cache | None = None) -> Tensor:
        first, last = self.layers[0], self.layers[-1]
        x = first.eh_proj(torch.cat([first.enorm(embedded), first.hnorm(hidden)], -1))
        for index, layer in enumerate(self.layers):
            x = layer(x, cache, index)
        return last.final_layernorm(x)


class Nemotron(nn.Module):
    """A Nemotron 3 language model.

    ``backbone`` gives hidden states, ``logits`` the output head in float32, ``mtp`` the drafting layer or None. The
    modules carry the checkpoint's names; `load` in checkpoint.py makes one from files, `generate` decodes with it.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.mtp = Mtp(config) if config.mtp_layers else None

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Token ids ``[B, T]`` -> logits ``[B, T, vocab]`` in float32 (float64 for a float64 model)."""
        return self.logits(self.backbone(ids, cache))

    def logits(self, hidden: Tensor) -> Tensor:
        y = self.lm_head(hidden)
        return y if y.dtype == torch.float64 else y.float()

    def draft_hidden(self, tokens: Tensor, hidden: Tensor, cache: Cache | None = None) -> Tensor:
        """The drafting layer on tokens t+1 ``[B, T]`` and hiddens t ``[B, T, d]``."""
        if self.mtp is None:
            raise ValueError("this checkpoint has no MTP layer (num_nextn_predict_layers is 0)")
        return self.mtp(self.backbone.embeddings(tokens), hidden, cache)

    def cache(self, batch: int, max_length: int, drafts: int = 0) -> Cache:
        weight = self.backbone.embeddings.weight
        return Cache(self.config, batch, max_length, drafts, dtype=weight.dtype, device=weight.device)

    def draft_cache(self, batch: int, max_length: int, drafts: int) -> Cache:
        weight, kinds = self.backbone.embeddings.weight, self.config.mtp_layers
        return Cache(self.config, batch, max_length, drafts, layers=kinds, dtype=weight.dtype, device=weight.device)

    @torch.no_grad()
    def init_weights(self, std: float = 0.02) -> None:
        """Random weights for training from scratch: normal, outputs into the residual scaled by 1/sqrt(layers).

        A starts at 1...heads and dt log-uniform in [0.001, 0.1], as Mamba-2 (arXiv:2405.21060) initialises them.
        """
        depth = math.sqrt(len(self.config.layers))
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2 and "conv1d" not in name:
                out = name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight", "down_proj", "fc2_latent"))
                parameter.normal_(0.0, std / depth if out else std)
        for module in self.modules():
            if isinstance(module, Mamba2):
                heads = module.config.mamba_num_heads
                module.A_log.copy_(torch.log(torch.arange(1, heads + 1)))
                dt = torch.exp(torch.rand(heads) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
                module.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
            if isinstance(module, MoE):
                module.gate.e_score_correction_bias.zero_()


