"""The blocks of a Nemotron 3 model on the operators of ``torch.ops.n3``.

Modules and tensors carry the names of the Hugging Face checkpoint, so that a state dict is a checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._dispatch import serving
from ..mamba import gated_rms_norm
from .cache import Cache
from .config import ATTENTION, MAMBA, MLP, MOE, Config

__all__ = ["Block", "Linear", "RMSNorm"]

n3 = torch.ops.n3
FEW_ROWS = 16  # up to here, rows go one by one through products whose bits would depend on how many there are
_one_by_one = False


@contextlib.contextmanager
def one_by_one() -> Iterator[None]:
    """In a ``with`` block, `by_row` takes every row alone: decode steps of large batches."""
    global _one_by_one
    before, _one_by_one = _one_by_one, True
    try:
        yield
    finally:
        _one_by_one = before


def by_row(fn: Callable[..., Tensor], *xs: Tensor) -> Tensor:
    """``fn`` on every row alone where there are few: a token's bits then do not depend on the tokens beside it.

    Verification of k drafts and k+1 plain steps must give the same logits. The kernels of n3 promise that by
    themselves; the references change their order of summation with the number of rows. `one_by_one` does the same for
    any number of rows.
    """
    rows = [x.reshape(-1, x.shape[-1]) for x in xs]
    count = rows[0].shape[0]
    if count <= 1 or not _few(count):
        return fn(*xs)
    return torch.cat([fn(*(r[i : i + 1] for r in rows)) for i in range(count)]).unflatten(0, xs[0].shape[:-1])


def product(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``, of few rows each with bits of its own: by one group of n3's product, which reads the weight
    once, or row by row where only ``F.linear`` is left, whose order of summation depends on the number of rows."""
    rows = x.reshape(-1, x.shape[-1])
    if not _few(rows.shape[0]):
        return F.linear(x, weight)
    args = rows, weight[None], _one_group(rows.shape[0], x.device)
    if serving("grouped_linear", *args) == "cpu":
        return n3.grouped_linear(*args).unflatten(0, x.shape[:-1])
    return by_row(lambda row: F.linear(row, weight), x)


def _few(rows: int) -> bool:
    return not torch.is_grad_enabled() and (rows <= FEW_ROWS or _one_by_one)


@cache
def _one_group(rows: int, device: torch.device) -> Tensor:
    return torch.tensor([0, rows], dtype=torch.int32, device=device)


class Linear(nn.Module):
    """``y = activation(x @ weight.T)``, the weight dense or NVFP4 as ModelOpt stores it; no bias, as in the family."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    @property
    def quantized(self) -> bool:
        return self.weight.dtype == torch.uint8

    def set_nvfp4(self, q: Tensor, block_scale: Tensor, global_scale: Tensor) -> None:
        del self.weight
        self.register_buffer("weight", q)
        self.register_buffer("weight_scale", block_scale)
        self.register_buffer("weight_scale_2", global_scale)

    def forward(self, x: Tensor, activation: str | None = None) -> Tensor:
        if self.quantized:
            return n3.nvfp4_linear(x, self.weight, self.weight_scale, self.weight_scale_2, None, activation)
        y = product(x, self.weight)
        return F.relu(y).square() if activation == "relu2" else y


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return gated_rms_norm(x, None, self.weight, x.shape[-1], self.eps)


class Mamba2(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.in_proj = Linear(c.hidden_size, c.d_inner + c.conv_dim + c.mamba_num_heads)
        self.conv1d = nn.Conv1d(c.conv_dim, c.conv_dim, c.conv_kernel, groups=c.conv_dim)  # holds weight and bias
        self.dt_bias = nn.Parameter(torch.zeros(c.mamba_num_heads))
        self.A_log = nn.Parameter(torch.zeros(c.mamba_num_heads))
        self.D = nn.Parameter(torch.ones(c.mamba_num_heads))
        self.norm = RMSNorm(c.d_inner, c.layer_norm_epsilon)
        self.out_proj = Linear(c.d_inner, c.hidden_size)

    def forward(self, u: Tensor, cache: Cache | None, layer: int) -> Tensor:
        zxbcdt = self.in_proj(u)
        return self.out_proj(self._parts(zxbcdt) if cache is None else self._mixer(zxbcdt, cache, layer))

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return -torch.exp(self.A_log.float()), self.D.float(), self.dt_bias.float()

    def _mixer(self, zxbcdt: Tensor, cache: Cache, layer: int) -> Tensor:
        """All between the projections in one operator, which goes on from the cache's states."""
        c = self.config
        first = (zxbcdt, self.conv1d.weight.squeeze(1), self.conv1d.bias, cache.conv[layer], cache.ssm[layer])
        weights, eps = (*self._weights(), self.norm.weight), self.norm.eps
        if not cache.prefilling:
            return n3.mamba2_decode(*first, *weights, cache.state_slots, cache.draft_slots, eps=eps)
        return n3.mamba2_prefill(
            *first, cache.state_slots, *weights, cache.has_initial, eps=eps, chunk_size=c.chunk_size
        )  # fmt: skip

    def _parts(self, zxbcdt: Tensor) -> Tensor:
        """The same from operators that have gradients, without states."""
        c = self.config
        z, xbc, dt = zxbcdt.split([c.d_inner, c.conv_dim, c.mamba_num_heads], dim=-1)
        xbc, _ = n3.causal_conv1d(xbc, self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu")
        x, B, C = xbc.split([c.d_inner, c.n_groups * c.ssm_state_size, c.n_groups * c.ssm_state_size], dim=-1)
        x = x.unflatten(-1, (c.mamba_num_heads, c.mamba_head_dim))
        B, C = (t.unflatten(-1, (c.n_groups, c.ssm_state_size)) for t in (B, C))
        A, D, dt_bias = self._weights()
        y, _ = n3.ssd_scan(x, dt, A, B, C, D, None, dt_bias, chunk_size=c.chunk_size)
        return gated_rms_norm(y.flatten(-2), z, self.norm.weight, c.d_inner // c.n_groups, self.norm.eps)


class Attention(nn.Module):
    """Grouped-query attention without positions: the family has no RoPE, the Mamba layers carry the order."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size)

    def forward(self, x: Tensor, cache: Cache | None, layer: int) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for proj in self._qkv())
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = cache.attend(layer, q, k, v)
        return self.o_proj(y.transpose(1, 2).flatten(-2))

    def _qkv(self) -> tuple[Linear, Linear, Linear]:
        return self.q_proj, self.k_proj, self.v_proj


class Mlp(nn.Module):
    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.up_proj = Linear(hidden, intermediate)
        self.down_proj = Linear(intermediate, hidden)

    def forward(self, x: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        return self.down_proj(self.up_proj(x, "relu2"))


class Experts(nn.Module):
    """The routed experts' weights, stacked: dense ``[E, out, in]``, or NVFP4 with one global scale per expert."""

    def __init__(self, config: Config):
        super().__init__()
        c, width = config, config.moe_latent_size or config.hidden_size
        self.up_proj = nn.Parameter(torch.empty(c.n_routed_experts, c.moe_intermediate_size, width))
        self.down_proj = nn.Parameter(torch.empty(c.n_routed_experts, width, c.moe_intermediate_size))

    def set_nvfp4(self, name: str, q: Tensor, block_scale: Tensor, global_scale: Tensor) -> None:
        delattr(self, name)
        self.register_buffer(name, q)
        self.register_buffer(f"{name}_scale", block_scale)
        self.register_buffer(f"{name}_scale_2", global_scale)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        scales = [
            getattr(self, f"{side}_proj_{suffix}", None) for side in ("up", "down") for suffix in ("scale", "scale_2")
        ]

        def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return n3.moe_experts(x, self.up_proj, self.down_proj, ids, weights, *scales)

        # A C++ kernel for the CPU gives a row the same bits in any company, the reference does not.
        if serving("moe_experts", x, self.up_proj, self.down_proj, ids, weights, *scales) == "cpu":
            return run(x, ids, weights)
        return by_row(run, x, ids, weights)


class Gate(nn.Module):
    def __init__(self, experts: int, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts))


class MoE(nn.Module):
    """Router and shared expert in the full width, routed experts in the latent width where there is one."""

    def __init__(self, config: Config):
        super().__init__()
        c = self.config = config
        self.gate = Gate(c.n_routed_experts, c.hidden_size)
        self.experts = Experts(c)
        self.shared_experts = Mlp(c.hidden_size, c.moe_shared_expert_intermediate_size)
        if c.moe_latent_size:
            self.fc1_latent_proj = Linear(c.hidden_size, c.moe_latent_size)
            self.fc2_latent_proj = Linear(c.moe_latent_size, c.hidden_size)

    def forward(self, x: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        c = self.config
        flat = x.reshape(-1, x.shape[-1])
        gate = self.gate.weight.float()
        logits = product(flat.float(), gate)
        ids, weights, load, _ = n3.moe_route(
            logits, self.gate.e_score_correction_bias, top_k=c.num_experts_per_tok, n_group=c.n_group,
            topk_group=c.topk_group, normalize=c.norm_topk_prob, scale=c.routed_scaling_factor,
        )  # fmt: skip
        if self.training:
            self.load = load  # tokens per expert, which training balances
        inner = self.fc1_latent_proj(flat) if c.moe_latent_size else flat
        y = self.experts(inner, ids, weights)
        y = self.fc2_latent_proj(y) if c.moe_latent_size else y
        return (y + self.shared_experts(flat)).view_as(x)


_MIXERS = {MAMBA: Mamba2, ATTENTION: Attention, MOE: MoE, MLP: lambda c: Mlp(c.hidden_size, c.intermediate_size)}


class Block(nn.Module):
    """``x + mixer(RMSNorm(x))``."""

    def __init__(self, config: Config, kind: str):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = _MIXERS[kind](config)

    def forward(self, x: Tensor, cache: Cache | None, layer: int) -> Tensor:
        return x + self.mixer(self.norm(x), cache, layer)
