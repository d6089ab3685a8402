from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference, reference_quantize
from .tensor import NVFP4Tensor

__all__ = ["quantize"]


def quantize(
    x: Tensor,
    global_scale: Tensor | None = None,
    *,
    rounding: str = "nearest",
    four_over_six: bool = False,
    metric: str = "mae",
    block: str = "1x16",
    per_row: bool = False,
    scale_layout: str = "linear",
    hadamard: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> NVFP4Tensor:
    r"""Returns ``x`` as e2m1 codes, ``x ~= e2m1 * block_scale * global_scale``, one e4m3 scale per 16 elements.

    Every step is one float32 operation, in this order::

        S_enc       = min(2688 / amax, FLT_MAX), 1 if amax is 0          amax over the finite elements of x
        block_scale = e4m3(block_amax * (S_enc * (1 / 6)))               nearest even, saturating at 448
        code        = e2m1(x * min(1 / (block_scale * (1 / S_enc)), FLT_MAX))
        global_scale = 1 / S_enc

    Codes round to nearest, ties to even, and saturate at 6; a zero keeps its sign (code 8 is -0). Where the stored
    block scale is 0 (a zero block, or one so small that its scale underflows) all codes are 0. A block with a NaN or an
    infinity gets scale byte 0x7f and codes 0: it alone decodes to NaN.

    Args:
        x: ``[..., K]``, float32, float16 or bfloat16, K a multiple of 16; any strides: ``x.mT`` is read where it lies,
            which makes the column-wise copy that training needs.
        global_scale: float32, 1 element (``per_row``: ``[...]``, one for each row): a decode scale to use instead, read
            on the device and returned as it is; ``S_enc = 1 / global_scale`` limited to [-FLT_MAX, FLT_MAX], or 1 if
            either is 0. A negative one makes the block scales negative; with NaN, S_enc is FLT_MAX.
        rounding: ``"nearest"``, or ``"stochastic"``: up with the probability of the distance from the lower code.
        four_over_six: per block the better of the scales that map its amax to 6 and to 4: ``e4m3(b)`` or
            ``e4m3(1.5 b)`` with ``b = block_amax / 6 * S_enc``. 2688 becomes 1536, so that ``1.5 b`` cannot saturate.
            Better is the smaller error of ``((code * scale) * amax) / 1536`` against x (amax of a given global scale:
            ``1536 * global_scale``), ties to 6. With stochastic rounding the choice is that of nearest rounding.
        metric: of that error: ``"mae"``, the sum of absolute differences, or ``"mse"``, of their squares; over k in
            order, and over the rows of a square block as a tree (i + 8, i + 4, i + 2, i + 1).
        block: ``"1x16"``, or ``"16x16"``: one scale per 16 rows too (rows a multiple of 16), stored for each row.
        per_row: one global scale per row of x instead of one in all, each from the row's own amax; not for 16x16.
        scale_layout: ``"linear"``, or ``"128x4"``: the tiles of block-scaled tensor cores, rows and scale columns
            padded with zero bytes to multiples of 128 and 4.
        hadamard: 16 signs, float32 ``[16]``: x becomes ``(x * signs) @ H16 / 4`` in every 16 elements first, a
            butterfly in float32 with strides 1, 2, 4, 8, rounded to the dtype of x.
        generator: source of stochastic rounding; the default generator of x's device if None.
    Returns:
        `NVFP4Tensor`: ``q`` uint8 ``[..., K/2]``, ``block_scale`` float8_e4m3fn ``[..., K/16]`` or
        ``[ceil(R/128)*128, ceil(K/64)*4]`` with R all rows, ``global_scale`` float32, 0 dimensions or ``[...]``. Byte
        for byte the same on every backend, device and number of threads. No gradient flows through; `fake_quantize`
        is for that.
    Raises:
        RuntimeError: a shape, dtype or option outside the above; the message names argument and values.
    Source: TransformerEngine's reference quantiser (``reference_nvfp4.py`` of version 2.20) for the order of
    operations, 2-D scaling, four-over-six and scales per row, equal to it byte for byte but for blocks whose scale
    underflows, to which it gives codes; arXiv:2509.25149 for the recipe; Four Over Six (arXiv:2512.02010).

    >>> t = quantize(torch.tensor([[6.0, -3.0, 0.5, 0.0] * 4]), torch.tensor(1.0))
    >>> t.dequantize(torch.float32)[0, :4].tolist()
    [6.0, -3.0, 0.5, 0.0]
    """
    seed = None
    if rounding == "stochastic":
        seed = torch.randint(2**63 - 1, (2,), generator=generator, device=x.device)
    parts = torch.ops.n3.nvfp4_quantize.default(
        x.detach(), global_scale, hadamard, seed, rounding=rounding, four_over_six=four_over_six, metric=metric,
        block=block, per_row=per_row, scale_layout=scale_layout,
    )  # fmt: skip
    return NVFP4Tensor(*parts, scale_layout, tuple(x.shape))


def check_input(check: Check, x: Tensor, k: int, global_scale: Tensor | None, metric: str, per_row: bool, layout: str):
    """What every quantiser asks of what it quantises: rows ``x`` that become rows of k elements."""
    check.that(k % 16 == 0, "x must have a last dimension that is a multiple of 16", k)
    if global_scale is not None:
        check.dtype("global_scale", global_scale, torch.float32)
        if per_row:
            check.shape("global_scale", global_scale, x.shape[:-1])
        else:
            check.that(global_scale.numel() == 1, "global_scale must have 1 element", global_scale.numel())
        check.same_device("x", x, global_scale=global_scale)
    check.choice("metric", metric, ("mae", "mse"))
    check.choice("scale_layout", layout, ("linear", "128x4"))


def empty_parts(x: Tensor, k: int, per_row: bool, scale_layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs for rows ``x`` that become rows of k elements."""
    lead = x.shape[:-1]
    q = x.new_empty((*lead, k // 2), dtype=torch.uint8)
    scale_shape = (*lead, k // 16)
    if scale_layout == "128x4":
        rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
        scale_shape = (reference.pad(rows, 128), reference.pad(k // 16, 4))
    block_scale = x.new_empty(scale_shape, dtype=torch.float8_e4m3fn)
    return q, block_scale, x.new_empty(lead if per_row else (), dtype=torch.float32)


def _check(
    x,
    global_scale=None,
    hadamard=None,
    seed=None,
    *,
    rounding="nearest",
    four_over_six=False,
    metric="mae",
    block="1x16",
    per_row=False,
    scale_layout="linear",
    op="nvfp4_quantize",
):
    check = Check(op)
    check.floating("x", x, double=False)
    check.that(x.dim() >= 1, "x must have at least 1 dimension", x.dim())
    check_input(check, x, x.shape[-1], global_scale, metric, per_row, scale_layout)
    check.choice("rounding", rounding, ("nearest", "stochastic"))
    check.choice("block", block, ("1x16", "16x16"))
    if block == "16x16":
        rows = x.shape[-2] if x.dim() > 1 else 1
        check.that(rows % 16 == 0, "x must have rows in multiples of 16 for block=16x16", rows)
        check.that(not per_row, "per_row must be False for block=16x16", per_row)
    if hadamard is not None:
        check.dtype("hadamard", hadamard, torch.float32)
        check.shape("hadamard", hadamard, (16,))
    if rounding == "stochastic":
        check.that(seed is not None, "seed must be given for rounding=stochastic", "None")
    if seed is not None:
        check.dtype("seed", seed, torch.int64)
        check.shape("seed", seed, (2,))
    check.same_device("x", x, hadamard=hadamard, seed=seed)


def _fake(x, *scales_and_seeds, per_row=False, scale_layout="linear", **options):
    return empty_parts(x, x.shape[-1], per_row, scale_layout)


_dispatch.register(
    "nvfp4_quantize",
    check=_check,
    fake=_fake,
    reference=reference_quantize.nvfp4_quantize,
    triton="n3kernels.triton_ops.nvfp4.quantize:nvfp4_quantize",
)
