"""The definition of NVFP4 quantisation and of its fused producers in plain PyTorch.

Quantisation is a sequence of single float32 roundings in a fixed order, TransformerEngine's, so that every backend
gives these very bytes. Divisors are tensors on purpose: PyTorch's CUDA kernels multiply by the reciprocal of a Python
number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._philox import element_words
from .reference import BLOCK, code_values, nvfp4_gemm, nvfp4_swizzle_scale

__all__ = [
    "FLT_MAX", "hadamard16", "nvfp4_gemm_quantized", "nvfp4_quantize", "relu2_nvfp4_quantize", "rms_norm",
    "rms_norm_nvfp4_quantize", "silu_mul", "silu_mul_nvfp4_quantize",
]  # fmt: skip

FLT_MAX = torch.finfo(torch.float32).max
E4M3_MAX = 448.0
E4M3_NAN = 0x7F


# ---------------------------------------------------------------- codes


def _pack(codes: Tensor) -> Tensor:
    return (codes[..., ::2] | codes[..., 1::2] << 4).to(torch.uint8)


def _nearest(v: Tensor) -> Tensor:
    """Magnitude codes of ``|v|`` to nearest, ties to the even code, 6 and above to 7."""
    a = v.abs()
    above = (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5.0)
    return torch.stack(above).sum(0)


def _stochastic(v: Tensor, random: Tensor) -> Tensor:
    """Magnitude codes of ``|v|``: a neighbour, the upper one with the probability of the fraction between the two.

    ``random`` holds 32-bit words r; the code is the lower neighbour if r * 2^-32 >= fraction. Both sides are exact.
    """
    a = v.abs().clamp(max=6.0)
    table = code_values(v.device)
    lower = torch.bucketize(a.contiguous(), table[:8], right=True) - 1
    upper = (lower + 1).clamp(max=7)
    width = (table[upper] - table[lower]).clamp(min=0.5)  # of the top code, whose fraction is 0, any
    fraction = (a - table[lower]) / width  # exact: widths are powers of two
    return torch.where(random.double() * 2.0**-32 >= fraction.double(), lower, upper)


def _random_words(shape: torch.Size, seed: Tensor) -> Tensor:
    """One 32-bit word per element: Philox4x32-10, key = seed, counter = (flat index >> 2, offset), word index & 3."""
    return element_words(seed, torch.arange(shape.numel(), device=seed.device)).view(shape)


# ---------------------------------------------------------------- scales


def _e4m3(v: Tensor) -> Tensor:
    """To nearest even, saturating at 448: PyTorch's own cast makes NaN of what is too large."""
    return v.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _at_most_max(v: Tensor) -> Tensor:
    return torch.fmin(v, torch.full_like(v, FLT_MAX))


def _encode_scale(x: Tensor, given: Tensor | None, normal: float, per_row: bool) -> tuple[Tensor, Tensor, Tensor]:
    """S_enc, the decode scale that is returned, and the amax that they stand for: 1 of each, or one per row of x."""
    one = torch.ones(x.shape[0] if per_row else 1, device=x.device)
    if given is not None:
        given = given.reshape(one.shape)
        s_enc = torch.where(given == 0, one, _at_most_max(one / given).clamp(min=-FLT_MAX))
        return torch.where(s_enc == 0, one, s_enc), given.clone(), given * normal
    finite = torch.where(x.isfinite(), x.abs(), 0.0)
    if not per_row:
        finite = finite.reshape(1, x.numel())
    amax = finite.amax(1) if finite.shape[1] else torch.zeros_like(one)
    s_enc = torch.where(amax == 0, one, _at_most_max(torch.full_like(one, normal) / amax))
    s_enc = torch.where(s_enc == 0, one, s_enc)
    return s_enc, one / s_enc, amax


def hadamard16(x: Tensor, signs: Tensor) -> Tensor:
    """``(x * signs) @ H / 4`` for every 16 elements, H the Sylvester Hadamard matrix, in float32.

    Four butterfly stages with strides 1, 2, 4, 8: ``(a, b) <- (a + b, a - b)`` for elements i and i + stride, each one
    rounding, then one exact product with 0.25.
    """
    v = x.unflatten(-1, (x.shape[-1] // BLOCK, BLOCK)) * signs
    for stride in (1, 2, 4, 8):
        a, b = v.unflatten(-1, (-1, 2, stride)).unbind(-2)
        v = torch.stack([a + b, a - b], -2).flatten(-3)
    return (v * 0.25).flatten(-2)


# ---------------------------------------------------------------- quantise


def _encode(x: Tensor, scale: Tensor, inv: Tensor, random: Tensor | None = None) -> Tensor:
    """Codes of blocks ``x`` ``[tiles, rows, 16]`` under the stored ``scale`` ``[tiles, 1, 1]``; inv = 1 / S_enc."""
    wide = scale.float()
    enc = _at_most_max(torch.ones_like(wide) / (wide * inv))
    v = x * enc
    magnitude = _nearest(v) if random is None else _stochastic(v, random)
    codes = magnitude | torch.signbit(v).long() << 3
    return torch.where(wide == 0, 0, codes)


def _error(x: Tensor, decoded: Tensor, metric: str) -> Tensor:
    """``[tiles, 1, 1]``: sums of a row in order of k; of 16 rows a tree, (i, i + 8), (i, i + 4), (i, i + 2), (0, 1)."""
    difference = decoded - x
    terms = difference.abs() if metric == "mae" else difference * difference
    rows = torch.zeros_like(terms[..., 0])
    for term in terms.unbind(-1):
        rows = rows + term
    while rows.shape[-1] > 1:
        half = rows.shape[-1] // 2
        rows = rows[..., :half] + rows[..., half:]
    return rows[..., None]


def _four_or_six(x: Tensor, amax: Tensor, s_enc: Tensor, inv: Tensor, global_amax: Tensor, metric: str) -> Tensor:
    """Of the block scales that put amax at 6 and at 4 the one with the smaller error of what is decoded; 6 on a tie."""
    base = amax / torch.full_like(amax, 6.0) * s_enc
    six, four = _e4m3(base), _e4m3(base * 1.5)
    errors = []
    for scale in (six, four):
        values = code_values(x.device)[_encode(x, scale, inv)]
        decoded = values * scale.float() * global_amax
        errors.append(_error(x, decoded / torch.full_like(decoded, 1536.0), metric))
    scales = (s.view(torch.uint8) for s in (four, six))
    return torch.where(errors[1] < errors[0], *scales).view(torch.float8_e4m3fn)


def _to_tiles(x: Tensor, rows: int) -> Tensor:
    """``[R, K]`` to ``[R/rows * K/16, rows, 16]``."""
    return x.view(x.shape[0] // rows, rows, x.shape[1] // BLOCK, BLOCK).transpose(1, 2).flatten(0, 1)


def _from_tiles(t: Tensor, shape: tuple[int, int], rows: int) -> Tensor:
    cols = shape[1] // BLOCK
    t = t.reshape(shape[0] // rows, cols, rows, t.shape[-1]).transpose(1, 2)
    return t.reshape(shape[0], cols * t.shape[-1]).contiguous()


def nvfp4_quantize(
    x: Tensor,
    global_scale: Tensor | None = None,
    hadamard: Tensor | None = None,
    seed: Tensor | None = None,
    *,
    rounding: str = "nearest",
    four_over_six: bool = False,
    metric: str = "mae",
    block: str = "1x16",
    per_row: bool = False,
    scale_layout: str = "linear",
) -> tuple[Tensor, Tensor, Tensor]:
    *lead, k = x.shape
    wide = x.reshape(x.shape[:-1].numel(), k).float()
    if hadamard is not None:
        wide = hadamard16(wide, hadamard).to(x.dtype).float()
    scales = _encode_scale(wide, global_scale, 1536.0 if four_over_six else 2688.0, per_row)
    s_enc, global_out, global_amax = scales
    inv = torch.ones_like(s_enc) / s_enc

    def of_tiles(v: Tensor) -> Tensor:  # 1 or R values, for [tiles, rows, 16]
        return (v.repeat_interleave(k // BLOCK) if per_row else v)[:, None, None]

    tile_rows = 16 if block == "16x16" else 1
    tiles = _to_tiles(wide, tile_rows)
    finite = tiles.isfinite().all(-1).all(-1)[:, None, None]
    tiles = torch.where(finite, tiles, 0.0)
    amax = tiles.abs().amax((-2, -1), keepdim=True)
    if four_over_six:
        scale = _four_or_six(tiles, amax, of_tiles(s_enc), of_tiles(inv), of_tiles(global_amax), metric)
    else:
        sixth = torch.ones_like(s_enc) / torch.full_like(s_enc, 6.0)
        scale = _e4m3(amax * of_tiles(s_enc * sixth))
    random = None
    if rounding == "stochastic":
        random = _to_tiles(_random_words(wide.shape, seed), tile_rows)
    codes = _encode(tiles, scale, of_tiles(inv), random)

    scale_bytes = torch.where(finite, scale.view(torch.uint8), E4M3_NAN).expand(-1, tile_rows, -1)
    q = _pack(_from_tiles(codes, wide.shape, tile_rows)).view(*lead, k // 2)
    block_scale = _from_tiles(scale_bytes, wide.shape, tile_rows).view(torch.float8_e4m3fn)
    global_out = global_out.view(lead if per_row else ())
    if scale_layout == "128x4":
        return q, nvfp4_swizzle_scale(block_scale if k else block_scale[:0]), global_out
    return q, block_scale.view(*lead, k // BLOCK), global_out


# ---------------------------------------------------------------- fused producers


def relu2_nvfp4_quantize(
    x: Tensor,
    global_scale: Tensor | None = None,
    *,
    four_over_six: bool = False,
    metric: str = "mae",
    per_row: bool = False,
    scale_layout: str = "linear",
) -> tuple[Tensor, Tensor, Tensor]:
    return nvfp4_quantize(
        x.relu().square(), global_scale, four_over_six=four_over_six, metric=metric, per_row=per_row,
        scale_layout=scale_layout,
    )  # fmt: skip


def silu_mul(x: Tensor) -> Tensor:
    """``silu(a) * b`` of ``x = [a, b]``, rounded once to the dtype of x."""
    a, b = x.double().chunk(2, -1)
    return (torch.nn.functional.silu(a) * b).to(x.dtype)


def silu_mul_nvfp4_quantize(
    x: Tensor,
    global_scale: Tensor | None = None,
    *,
    four_over_six: bool = False,
    metric: str = "mae",
    per_row: bool = False,
    scale_layout: str = "linear",
) -> tuple[Tensor, Tensor, Tensor]:
    return nvfp4_quantize(
        silu_mul(x), global_scale, four_over_six=four_over_six, metric=metric, per_row=per_row,
        scale_layout=scale_layout,
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """(y, x + residual): the sum is rounded to the dtype of the residual, and is what is normalised."""
    total = None if residual is None else (x.float() + residual.float()).to(residual.dtype)
    h = (x if total is None else total).float()
    mean = h.double().square().mean(-1, keepdim=True)
    rstd = (mean + eps).rsqrt().float()
    return (h * rstd * weight.float()).to(x.dtype), total


def rms_norm_nvfp4_quantize(
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None = None,
    global_scale: Tensor | None = None,
    *,
    eps: float = 1e-5,
    four_over_six: bool = False,
    metric: str = "mae",
    per_row: bool = False,
    scale_layout: str = "linear",
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, total = rms_norm(x, weight, residual, eps)
    parts = nvfp4_quantize(
        y, global_scale, four_over_six=four_over_six, metric=metric, per_row=per_row, scale_layout=scale_layout
    )
    nothing = x.new_empty(0)
    return *parts, y if keep else nothing, nothing if total is None else total


def nvfp4_gemm_quantized(
    a: Tensor,
    a_scale: Tensor,
    a_global: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_global: Tensor,
    global_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    *,
    a_layout: str = "linear",
    b_layout: str = "linear",
    scale_layout: str = "linear",
) -> tuple[Tensor, Tensor]:
    y = nvfp4_gemm(
        a, a_scale, a_global, b, b_scale, b_global, bias, out_dtype=torch.float32, a_layout=a_layout, b_layout=b_layout
    )
    if activation == "relu2":
        y = y.relu().square()
    return nvfp4_quantize(y, global_scale, scale_layout=scale_layout)[:2]
