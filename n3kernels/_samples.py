"""One small call of every operator: ``SAMPLES[name]()`` gives its arguments, the same on every machine.

`n3kernels doctor` runs them on every backend, the tests put them through ``torch.library.opcheck``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _dispatch

__all__ = ["SAMPLES", "sample"]

Call = tuple[tuple[Any, ...], dict[str, Any]]
SAMPLES: dict[str, Callable[[], Call]] = {}


def sample(name: str, device: str = "cpu") -> Call:
    """Arguments and keyword arguments of the sample call of ``torch.ops.n3.<name>``, tensors on ``device``."""
    args, kwargs = SAMPLES[name]()

    def place(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return tuple(map(place, args)), {name: place(value) for name, value in kwargs.items()}


def _of(name: str) -> Callable[[Callable[[_Random], Call]], Callable[[_Random], Call]]:
    def keep(make: Callable[[_Random], Call]) -> Callable[[_Random], Call]:
        SAMPLES[name] = lambda: make(_Random())
        return make

    return keep


class _Random:
    """Draws that depend on nothing but their order."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def weight(self, *shape: int) -> Tensor:
        """Scaled so that a product keeps the size of what it multiplies."""
        return self.normal(*shape) * shape[-1] ** -0.5

    def integers(self, most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=self.generator, dtype=torch.int32)

    def nvfp4(self, *shape: int) -> tuple[Tensor, Tensor, Tensor]:
        """Weights ``[..., N, K]`` in NVFP4; stacked ones have a global scale each."""
        reference = _dispatch.OPS["nvfp4_quantize"].reference
        if len(shape) == 2:
            return reference(self.weight(*shape))
        parts = [reference(self.weight(*shape[1:])) for _ in range(shape[0])]
        return tuple(torch.stack(part) for part in zip(*parts, strict=True))


def _ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# ---------------------------------------------------------------- nvfp4


@_of("nvfp4_quantize")
def _(r: _Random) -> Call:
    return (r.normal(3, 64),), {}


@_of("nvfp4_dequantize")
def _(r: _Random) -> Call:
    return r.nvfp4(5, 48), {"dtype": torch.float32}


@_of("nvfp4_linear")
def _(r: _Random) -> Call:
    return (r.normal(3, 64), *r.nvfp4(24, 64), r.normal(24), "relu2"), {}


@_of("nvfp4_linear_fp8")
def _(r: _Random) -> Call:
    return (r.normal(3, 64), *r.nvfp4(24, 64), r.normal(24), "relu2"), {}


@_of("nvfp4_gemm")
def _(r: _Random) -> Call:
    return (*r.nvfp4(3, 64), *r.nvfp4(24, 64), r.normal(24)), {"out_dtype": torch.float32}


@_of("nvfp4_gemm.quantized")
def _(r: _Random) -> Call:
    # Block scales of 1: the sums are exact in any order, and so every backend's codes are the same.
    def operand(rows: int) -> tuple[Tensor, ...]:
        codes = r.integers(256, rows, 32).to(torch.uint8)
        return codes, torch.ones(rows, 4).to(torch.float8_e4m3fn), torch.tensor(0.25)

    return (*operand(3), *operand(32), torch.tensor(0.01), None, "relu2"), {"scale_layout": "128x4"}


@_of("nvfp4_grouped_gemm")
def _(r: _Random) -> Call:
    return (*r.nvfp4(7, 64), *r.nvfp4(3, 24, 64), _ints(1, 4, 4, 6)), {"out_dtype": torch.float32}


@_of("nvfp4_repack")
def _(r: _Random) -> Call:
    return r.nvfp4(24, 80)[:2], {}


@_of("nvfp4_linear.packed")
def _(r: _Random) -> Call:
    q, block_scale, global_scale = r.nvfp4(24, 80)
    blob = _dispatch.OPS["nvfp4_repack"].reference(q, block_scale)
    return (r.normal(3, 80), blob, global_scale, 24, r.normal(24), "relu2"), {}


@_of("nvfp4_fake_quantize")
def _(r: _Random) -> Call:
    return (r.normal(5, 48), None, torch.tensor([3, 4]), "stochastic"), {}


@_of("relu2_nvfp4_quantize")
def _(r: _Random) -> Call:
    return (r.normal(5, 48),), {"scale_layout": "128x4"}


@_of("silu_mul_nvfp4_quantize")
def _(r: _Random) -> Call:
    return (r.normal(5, 96),), {"per_row": True}


@_of("rms_norm_nvfp4_quantize")
def _(r: _Random) -> Call:
    return (r.normal(5, 48), r.normal(48), r.normal(5, 48)), {"keep": True}


@_of("nvfp4_embedding")
def _(r: _Random) -> Call:
    return (r.integers(7, 2, 3), *r.nvfp4(7, 32)), {"dtype": torch.float32}


@_of("nvfp4_swizzle_scale")
def _(r: _Random) -> Call:
    return (r.nvfp4(40, 96)[1],), {}


@_of("nvfp4_unswizzle_scale")
def _(r: _Random) -> Call:
    swizzle = _dispatch.OPS["nvfp4_swizzle_scale"].reference
    return (swizzle(r.nvfp4(40, 96)[1]), 40, 6), {}


# ---------------------------------------------------------------- mamba: 6 tokens, 4 heads of 8, 2 groups, 16 states


@_of("gated_rms_norm")
def _(r: _Random) -> Call:
    return (r.normal(3, 32), r.normal(3, 32), r.normal(32), 16), {}


@_of("gated_rms_norm_bwd")
def _(r: _Random) -> Call:
    return (r.normal(3, 32), r.normal(3, 32), r.normal(3, 32), r.normal(32), 16, 1e-5, False), {}


@_of("causal_conv1d")
def _(r: _Random) -> Call:
    return (r.normal(2, 6, 12), r.normal(12, 4), r.normal(12), r.normal(2, 12, 3)), {"activation": "silu"}


@_of("causal_conv1d.slots")
def _(r: _Random) -> Call:
    args = (r.normal(2, 6, 12), r.normal(12, 4), r.normal(12), r.normal(5, 12, 4), _ints(2, 0))
    return (*args, torch.tensor([True, False]), None, _ints(1, 10), _ints(1, 4)), {"activation": "silu"}


@_of("causal_conv1d_bwd")
def _(r: _Random) -> Call:
    grads = r.normal(2, 6, 12), r.normal(2, 12, 3)
    return (*grads, r.normal(2, 6, 12), r.normal(12, 4), r.normal(12), r.normal(2, 12, 3), None, "silu"), {}


@_of("causal_conv1d_update")
def _(r: _Random) -> Call:
    args = (r.normal(2, 3, 12), r.normal(9, 12, 4), r.normal(12, 4), r.normal(12), _ints([0, 1], [2, 3]))
    tree = {"num_accepted": _ints(2, 1), "num_tokens": _ints(3, 2), "parents": _ints([-1, 0, 0], [-1, -1, 0])}
    return (*args, _ints([4, 5, 6], [7, 8, -1])), {**tree, "activation": "silu"}


def _scan(r: _Random, tokens: int) -> tuple[Tensor, ...]:
    """x, dt, A, B, C, D, z and dt_bias."""
    x, dt, A = r.normal(2, tokens, 4, 8), r.normal(2, tokens, 4), -torch.rand(4, generator=r.generator) * 8
    B, C = r.normal(2, tokens, 2, 16), r.normal(2, tokens, 2, 16)
    return x, dt, A, B, C, r.normal(4), r.normal(2, tokens, 4, 8), r.normal(4) - 2


@_of("ssd_scan")
def _(r: _Random) -> Call:
    return (*_scan(r, 6), r.normal(2, 4, 8, 16)), {"chunk_size": 4}


@_of("ssd_scan.slots")
def _(r: _Random) -> Call:
    args = (*_scan(r, 6), r.normal(5, 4, 8, 16), _ints(2, 0), torch.tensor([True, False]))
    return (*args, None, _ints(1, 10), _ints(1, 4)), {"chunk_size": 4}


@_of("ssd_scan_bwd")
def _(r: _Random) -> Call:
    grads = r.normal(2, 6, 4, 8), r.normal(2, 4, 8, 16)
    return (*grads, *_scan(r, 6), r.normal(2, 4, 8, 16), None, 4, True, 0.0, None), {}


@_of("ssm_update")
def _(r: _Random) -> Call:
    args = (r.normal(9, 4, 8, 16), *_scan(r, 3), _ints([0, 1], [2, 3]), _ints([4, 5, 6], [7, 8, -1]))
    tree = {"num_accepted": _ints(2, 1), "num_tokens": _ints(3, 2), "parents": _ints([-1, 0, 0], [-1, -1, 0])}
    return args, {**tree, "dt_max": 0.5}


def _rings(r: _Random) -> tuple[Tensor, Tensor, Tensor]:
    """x, B and dt of 6 tokens in each of 3 slots."""
    return r.normal(3, 6, 4, 8), r.normal(3, 6, 2, 16), r.normal(3, 6, 4).abs()


@_of("ssm_replay_update")
def _(r: _Random) -> Call:
    """The first sequence folds its committed tokens into the state, the second does not."""
    state, positions = r.normal(3, 4, 8, 16), _ints([4, 1], [0, 0], [5, 3])
    return (state, *_rings(r), positions, *_scan(r, 3), _ints(2, 0)), {"parents": _ints([-1, 0, 0], [-1, -1, 0])}


@_of("ssm_replay_commit")
def _(r: _Random) -> Call:
    rings = _rings(r)
    return (_ints([4, 1], [0, 0], [5, 3]), *rings, _ints(2, 1), 3, _ints([0, 2, 0], [1, 0, 0]), _ints(2, 0)), {}


@_of("ssm_replay_flush")
def _(r: _Random) -> Call:
    state, rings = r.normal(3, 4, 8, 16), _rings(r)
    return (state, _ints([4, 1], [0, 0], [5, 3]), *rings, -torch.rand(4, generator=r.generator), _ints(2, -1, 0)), {}


def _mixer(r: _Random, *tokens: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """zxbcdt, the convolution's weights and both states; A, D, dt_bias and the norm's weight."""
    first = r.normal(*tokens, 132), r.normal(96, 4), r.normal(96), r.normal(9, 96, 3), r.normal(9, 4, 8, 16)
    return first, (-torch.rand(4, generator=r.generator) * 8, r.normal(4), r.normal(4) - 2, r.normal(32))


@_of("mamba2_prefill")
def _(r: _Random) -> Call:
    first, rest = _mixer(r, 12)
    where = (torch.tensor([True, False]), _ints(0, 4, 11), _ints(1, 10), _ints(1, 4))
    return (*first, _ints(2, 0), *rest, *where), {"chunk_size": 4}


@_of("mamba2_decode")
def _(r: _Random) -> Call:
    first, rest = _mixer(r, 2, 3)
    tree = {"num_accepted": _ints(2, 1), "num_tokens": _ints(3, 2), "parents": _ints([-1, 0, 0], [-1, -1, 0])}
    return (*first, *rest, _ints([0, 1], [2, 3]), _ints([4, 5, 6], [7, 8, -1])), {**tree, "group_size": 8}


# ---------------------------------------------------------------- moe: 5 tokens, 8 experts, 2 of them per token


@_of("moe_route")
def _(r: _Random) -> Call:
    return (r.normal(5, 8), 0.1 * r.normal(8)), {"top_k": 2, "n_group": 4, "topk_group": 2, "scale": 2.5}


@_of("moe_route_bwd")
def _(r: _Random) -> Call:
    return (r.normal(5, 2), r.normal(5, 8), _expert_ids(r)), {"scale": 2.5}


@_of("moe_sort")
def _(r: _Random) -> Call:
    return (r.integers(8, 5, 2) - 1, 4, 2), {}


def _expert_ids(r: _Random) -> Tensor:
    return torch.stack([torch.randperm(8, generator=r.generator)[:2] for _ in range(5)]).int()


def _experts(r: _Random) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ids = _expert_ids(r)
    return r.normal(5, 32), r.weight(8, 48, 32), r.weight(8, 32, 48), ids, r.normal(5, 2).abs()


@_of("moe_experts")
def _(r: _Random) -> Call:
    x, _, _, ids, weights = _experts(r)
    (up, up_scale, up_global), (down, down_scale, down_global) = r.nvfp4(8, 48, 32), r.nvfp4(8, 32, 48)
    scales = {"up_scale": up_scale, "up_global": up_global, "down_scale": down_scale, "down_global": down_global}
    return (x, up, down, ids, weights), scales


@_of("moe_experts_bwd")
def _(r: _Random) -> Call:
    return (r.normal(5, 32), *_experts(r), "relu2", 0), {}


def _groups(r: _Random) -> dict[str, Tensor]:
    """Offsets, gather and row_scale of 9 rows, the first and the last in no group, one of no token."""
    return {"offsets": _ints(1, 4, 4, 8), "gather": _ints(0, 2, -1, 4, 4, 0, 1, 3, 2), "row_scale": r.normal(9)}


@_of("grouped_linear")
def _(r: _Random) -> Call:
    x, (w, block_scale, global_scale), groups = r.normal(5, 32), r.nvfp4(3, 24, 32), _groups(r)
    scales = {"block_scale": block_scale, "global_scale": global_scale}
    return (x, w), {**groups, **scales, "activation": "silu"}


@_of("grouped_linear_bwd")
def _(r: _Random) -> Call:
    return (r.normal(9, 24), r.normal(5, 32), r.weight(3, 24, 32), *_groups(r).values(), "relu2"), {}


@_of("latent_moe")
def _(r: _Random) -> Call:
    routed = (r.weight(8, 64), 0.1 * r.normal(8), r.weight(8, 48, 32), r.weight(8, 32, 48))
    full = (r.weight(80, 64), r.weight(64, 80), r.weight(32, 64), r.weight(64, 32))
    return (r.normal(5, 64), *routed, *full), {"top_k": 2}


@_of("latent_moe_front")
def _(r: _Random) -> Call:
    return (r.normal(5, 64), r.weight(8, 64), r.weight(32, 64), r.weight(80, 64)), {}


@_of("latent_moe_tail")
def _(r: _Random) -> Call:
    return (r.normal(5, 32), r.weight(64, 32), r.normal(5, 80), r.weight(64, 80), r.normal(5, 64)), {}


# ---------------------------------------------------------------- mtp: 40 tokens of vocabulary


@_of("sample")
def _(r: _Random) -> Call:
    args = (r.normal(3, 40), torch.tensor([7, 8, 9]), torch.tensor([5, 6, 7]))
    options = {"top_k": _ints(0, 8, 8), "top_p": torch.tensor([1.0, 0.9, 0.8])}
    return args, {"temperature": torch.tensor([0.0, 0.7, 1.3]), **options}


@_of("mtp_verify")
def _(r: _Random) -> Call:
    logits = r.normal(5, 40)
    drafts = logits.argmax(1).int()
    drafts[1] = (drafts[1] + 1) % 40  # the second draft of the first request is likely to be refused
    drafts[[2, 4]] = -1
    args = (logits, drafts, _ints(0, 3, 5), torch.tensor([7, 8]), torch.tensor([5, 6]))
    return args, {"max_drafts": 2, "temperature": torch.tensor([0.0, 0.8]), "mode": "coupled"}


@_of("mtp_verify_tree")
def _(r: _Random) -> Call:
    logits = r.normal(6, 40)
    nodes = _ints(0, int(logits[0].argmax()), 5, int(logits[1].argmax()), 0, 7)  # a path of two, and two siblings
    args = (logits, nodes, _ints(-1, 0, 0, 1, -1, 0), _ints(0, 4, 6), torch.tensor([7, 8]), torch.tensor([5, 6]))
    return args, {"max_depth": 2, "temperature": torch.tensor([0.0, 0.8]), "mode": "token"}


@_of("mtp_draft_sample")
def _(r: _Random) -> Call:
    args = (r.normal(3, 40), torch.tensor([7, 8, 9]), torch.tensor([5, 6, 7]))
    return args, {"max_ids": 4, "temperature": torch.tensor([0.0, 0.7, 1.3])}


@_of("mtp_commit")
def _(r: _Random) -> Call:
    args = (_ints([4, 5, 6], [7, -1, -1]), _ints(3, 1), _ints(0, 3, 6), _ints(10, 20, 30))
    state = {"finished": _ints(0, 0, 0), "histogram": torch.zeros(4, dtype=torch.int64)}
    rings = {"ring_pos": _ints([0, 1], [2, 3], [1, 4]), "ring_size": 6, "ring_tokens": 3}
    return args, {"slot": _ints(2, 0), "eos_ids": _ints(6), "max_len": _ints(40, 40, 40), **state, **rings}


@_of("thinking_budget")
def _(r: _Random) -> Call:
    by_request = {"num_output": _ints(2, 9), "active": _ints(1, 1), "budget": _ints(3, 4), "grace": _ints(0, 2)}
    tail, end = _ints([7, 8], [8, 9]), _ints(13, 14)
    args = (_ints(9, 13, -1, 5, -1), _ints(0, 3, 5), tail, *by_request.values(), end, _ints(14), _ints(1 << 9))
    return args, {}
