from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference
from .tensor import NVFP4Tensor

__all__ = ["quantize"]


def quantize(
    x: Tensor,
    global_scale: Tensor | None = None,
    *,
    rounding: str = "nearest",
    four_over_six: bool = False,
    block: str = "1x16",
    scale_layout: str = "linear",
    hadamard: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> NVFP4Tensor:
    r"""Returns ``x`` as e2m1 codes, ``x ~= e2m1 * block_scale * global_scale``, one e4m3 scale per 16 elements.

    Every step is one float32 operation, in this order::

        S_enc       = min(2688 / amax, FLT_MAX), 1 if amax is 0          amax over the finite elements of x
        block_scale = e4m3(block_amax * (S_enc / 6))                     nearest even, saturating at 448
        code        = e2m1(x * min(1 / (block_scale * (1 / S_enc)), FLT_MAX))
        global_scale = 1 / S_enc

    Codes round to nearest, ties to even, and saturate at 6; a zero keeps its sign (code 8 is -0). Where the stored
    block scale is 0 (a zero block, or one so small that its scale underflows) all codes are 0. A block with a NaN or an
    infinity gets scale byte 0x7f and codes 0: it alone decodes to NaN.

    Args:
        x: ``[..., K]``, float32, float16 or bfloat16, K a multiple of 16; any strides.
        global_scale: float32, 1 element: a decode scale to use instead; ``S_enc = min(1 / global_scale, FLT_MAX)``, or
            1 if it is 0. It is read on the device and returned as it is.
        rounding: ``"nearest"``, or ``"stochastic"``: up with the probability of the distance from the lower code.
        four_over_six: per block the better of the scales that map its amax to 6 and to 4, by the sum of absolute
            errors, ties to 6: ``e4m3(b)`` or ``e4m3(1.5 b)`` with ``b = block_amax / 6 * S_enc``. 2688 becomes 1536,
            so that ``1.5 b`` cannot saturate. With stochastic rounding the choice is that of nearest rounding.
        block: ``"1x16"``, or ``"16x16"``: one scale per 16 rows too (rows a multiple of 16), stored for each row.
        scale_layout: ``"linear"``, or ``"128x4"``: the tiles of block-scaled tensor cores, rows and scale columns
            padded with zero bytes to multiples of 128 and 4.
        hadamard: 16 signs, float32 ``[16]``: x becomes ``(x * signs) @ H16 / 4`` in every 16 elements first, a
            butterfly in float32 with strides 1, 2, 4, 8.
        generator: source of stochastic rounding; the default generator of x's device if None.
    Returns:
        `NVFP4Tensor`: ``q`` uint8 ``[..., K/2]``, ``block_scale`` float8_e4m3fn ``[..., K/16]`` or
        ``[ceil(R/128)*128, ceil(K/64)*4]`` with R all rows, ``global_scale`` float32, 0 dimensions. Byte for byte the
        same on every backend, device and number of threads. No gradient flows through.
    Raises:
        RuntimeError: a shape, dtype or option outside the above; the message names argument and values.
    Source: TransformerEngine's ``NVFP4BlockScaling`` for the order of operations, stochastic rounding, 2-D scaling and
    the Hadamard transform; Four Over Six (arXiv:2512.02010), errors taken of ``(code * scale) * (1 / S_enc)``.

    >>> t = quantize(torch.tensor([[6.0, -3.0, 0.5, 0.0] * 4]), torch.tensor(1.0))
    >>> t.dequantize(torch.float32)[0, :4].tolist()
    [6.0, -3.0, 0.5, 0.0]
    """
    seed = None
    if rounding == "stochastic":
        seed = torch.randint(2**63 - 1, (2,), generator=generator, device=x.device)
    q, block_scale, global_scale = torch.ops.n3.nvfp4_quantize.default(
        x.detach(), global_scale, hadamard, seed, rounding=rounding, four_over_six=four_over_six, block=block,
        scale_layout=scale_layout,
    )  # fmt: skip
    return NVFP4Tensor(q, block_scale, global_scale, scale_layout, tuple(x.shape))


def _check(
    x,
    global_scale=None,
    hadamard=None,
    seed=None,
    *,
    rounding="nearest",
    four_over_six=False,
    block="1x16",
    scale_layout="linear",
):
    check = Check("nvfp4_quantize")
    check.floating("x", x, double=False)
    check.that(x.dim() >= 1, "x must have at least 1 dimension", x.dim())
    k = x.shape[-1]
    check.that(k % 16 == 0, "x must have a last dimension that is a multiple of 16", k)
    if global_scale is not None:
        check.dtype("global_scale", global_scale, torch.float32)
        check.that(global_scale.numel() == 1, "global_scale must have 1 element", global_scale.numel())
        check.same_device("x", x, global_scale=global_scale)
    check.choice("rounding", rounding, ("nearest", "stochastic"))
    check.choice("block", block, ("1x16", "16x16"))
    check.choice("scale_layout", scale_layout, ("linear", "128x4"))
    if block == "16x16":
        rows = x.shape[-2] if x.dim() > 1 else 1
        check.that(rows % 16 == 0, "x must have rows in multiples of 16 for block=16x16", rows)
    if hadamard is not None:
        check.dtype("hadamard", hadamard, torch.float32)
        check.shape("hadamard", hadamard, (16,))
    if rounding == "stochastic":
        check.that(seed is not None, "seed must be given for rounding=stochastic", "None")
    if seed is not None:
        check.dtype("seed", seed, torch.int64)
        check.shape("seed", seed, (2,))
    check.same_device("x", x, hadamard=hadamard, seed=seed)


def _fake(x, *scales_and_seeds, scale_layout="linear", **options):
    *lead, k = x.shape
    q = x.new_empty((*lead, k // 2), dtype=torch.uint8)
    scale_shape = (*lead, k // 16)
    if scale_layout == "128x4":
        rows = x.numel() // k if k else 0
        scale_shape = (reference.pad(rows, 128), reference.pad(k // 16, 4))
    block_scale = x.new_empty(scale_shape, dtype=torch.float8_e4m3fn)
    return q, block_scale, x.new_empty((), dtype=torch.float32)


def _supports(x, global_scale=None, hadamard=None, seed=None, *, rounding="nearest", block="1x16", **options):
    """The options of training are served by the reference alone."""
    if rounding == "stochastic":
        return "rounding='stochastic' is served by the reference alone"
    if block == "16x16":
        return "block='16x16' is served by the reference alone"
    return None if hadamard is None else "hadamard is served by the reference alone"


_dispatch.register(
    "nvfp4_quantize",
    check=_check,
    fake=_fake,
    reference=reference.nvfp4_quantize,
    triton="n3kernels.triton_ops.nvfp4.quantize:nvfp4_quantize",
    supports={"cpu": _supports, "triton": _supports, "cuda": _supports},
)
