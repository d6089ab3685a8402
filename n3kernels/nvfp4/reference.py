"""The definition of every nvfp4 operator in plain PyTorch: slow, and obvious on purpose.

Quantisation is a sequence of single float32 roundings in a fixed order, so that every backend gives these very bytes.
Divisors are tensors on purpose: PyTorch's CUDA kernels multiply by the reciprocal of a Python number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import Check
from .._philox import element_words

__all__ = [
    "BLOCK", "FLT_MAX", "decode", "nvfp4_dequantize", "nvfp4_embedding", "nvfp4_linear", "nvfp4_quantize",
    "nvfp4_swizzle_scale", "nvfp4_unswizzle_scale", "pad",
]  # fmt: skip

BLOCK = 16  # elements per block scale
FLT_MAX = torch.finfo(torch.float32).max
E4M3_MAX = 448.0
E4M3_NAN = 0x7F


def pad(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple


# ---------------------------------------------------------------- codes


def _table(device: torch.device) -> Tensor:
    """Values of codes 0..15: 0, 0.5, 1, 1.5, 2, 3, 4, 6, then the same negated, -0 included. Computed where it is
    used, as a CUDA graph cannot capture a copy from the host."""
    code = torch.arange(8, device=device)
    halves = torch.where(code < 2, code, (2 + code % 2) << (code // 2) >> 1)
    return torch.cat([halves * 0.5, halves * -0.5])


def _values(q: Tensor) -> Tensor:
    """e2m1 values ``[..., K]`` of ``q`` ``[..., K/2]``: the low nibble is the even element."""
    table = _table(q.device)
    pairs = torch.stack([table.repeat(16), table.repeat_interleave(16)], -1)  # of every byte
    return pairs.index_select(0, q.reshape(-1).int()).view(*q.shape[:-1], q.shape[-1] * 2)


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
    table = _table(v.device)
    lower = torch.bucketize(a, table[:8], right=True) - 1
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


def _encode_scale(x: Tensor, global_scale: Tensor | None, normal: float) -> tuple[Tensor, Tensor]:
    """S_enc and the decode scale that is returned: given, or such that amax becomes 6 times ``normal / 6``."""
    one = torch.ones((), device=x.device)
    if global_scale is not None:
        given = global_scale.reshape(())
        s_enc = torch.where(given == 0, one, _at_most_max(one / given))
        return torch.where(s_enc == 0, one, s_enc), given.clone()
    finite = torch.where(x.isfinite(), x.abs(), 0.0)
    amax = finite.amax() if x.numel() else torch.zeros_like(one)
    s_enc = torch.where(amax == 0, one, _at_most_max(torch.full_like(one, normal) / amax))
    s_enc = torch.where(s_enc == 0, one, s_enc)
    return s_enc, one / s_enc


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
    """Codes of blocks ``x`` ``[..., 16]`` under the stored ``scale`` ``[..., 1]``; inv = 1 / S_enc."""
    wide = scale.float()
    enc = _at_most_max(torch.ones_like(wide) / (wide * inv))
    v = x * enc
    magnitude = _nearest(v) if random is None else _stochastic(v, random)
    codes = magnitude | torch.signbit(v).long() << 3
    return torch.where(wide == 0, 0, codes)


def _sum_in_order(terms: Tensor, dim: int) -> Tensor:
    first, *rest = terms.unbind(dim)
    for term in rest:
        first = first + term
    return first


def _four_or_six(x: Tensor, amax: Tensor, s_enc: Tensor, inv: Tensor) -> Tensor:
    """Of the block scales that put amax at 6 and at 4 the one with the smaller sum of |decoded - x|; 6 on a tie.

    ``x`` is ``[tiles, rows, 16]``; a tile's sum runs over k = 0..15 of each row, then over the rows.
    """
    base = amax / torch.full_like(amax, 6.0) * s_enc
    scales, errors = [], []
    for scale in (_e4m3(base), _e4m3(base * 1.5)):
        codes = _encode(x, scale, inv)
        decoded = _table(x.device)[codes] * scale.float() * inv
        errors.append(_sum_in_order(_sum_in_order((decoded - x).abs(), -1), -1)[:, None, None])
        scales.append(scale)
    better = (errors[1] < errors[0]).expand_as(scales[0])
    six, four = (s.view(torch.uint8) for s in scales)
    return torch.where(better, four, six).view(torch.float8_e4m3fn)


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
    block: str = "1x16",
    scale_layout: str = "linear",
) -> tuple[Tensor, Tensor, Tensor]:
    lead, k = x.shape[:-1], x.shape[-1]
    wide = x.reshape(x.numel() // k if k else 0, k).float()
    if hadamard is not None:
        wide = hadamard16(wide, hadamard)
    s_enc, global_out = _encode_scale(wide, global_scale, 1536.0 if four_over_six else 2688.0)
    inv = torch.ones_like(s_enc) / s_enc

    tile_rows = 16 if block == "16x16" else 1
    tiles = _to_tiles(wide, tile_rows)
    finite = tiles.isfinite().all(-1).all(-1)[:, None, None]
    tiles = torch.where(finite, tiles, 0.0)
    amax = tiles.abs().amax((-2, -1), keepdim=True)
    if four_over_six:
        scale = _four_or_six(tiles, amax, s_enc, inv)
    else:
        scale = _e4m3(amax * (s_enc / torch.full_like(s_enc, 6.0)))
    random = None
    if rounding == "stochastic":
        random = _to_tiles(_random_words(wide.shape, seed), tile_rows)
    codes = _encode(tiles, scale, inv, random)

    scale_bytes = torch.where(finite, scale.view(torch.uint8), E4M3_NAN).expand(-1, tile_rows, -1)
    q = _pack(_from_tiles(codes, wide.shape, tile_rows)).view(*lead, k // 2)
    block_scale = _from_tiles(scale_bytes, wide.shape, tile_rows).view(torch.float8_e4m3fn)
    if scale_layout == "128x4":
        return q, nvfp4_swizzle_scale(block_scale), global_out
    return q, block_scale.view(*lead, k // BLOCK), global_out


# ---------------------------------------------------------------- decode


def decode(q: Tensor, block_scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``e2m1 * e4m3`` without the global scale, ``[..., K]``: exact in every floating dtype but the 8-bit ones."""
    blocks = _values(q).view(*block_scale.shape, BLOCK)
    return (blocks * block_scale.float().unsqueeze(-1)).flatten(-2).to(dtype)


def nvfp4_dequantize(
    q: Tensor, block_scale: Tensor, global_scale: Tensor, *, dtype: torch.dtype, scale_layout: str = "linear"
) -> Tensor:
    if scale_layout == "128x4":
        ks = q.shape[-1] // 8
        rows = q.numel() // q.shape[-1] if ks else 0
        block_scale = nvfp4_unswizzle_scale(block_scale, rows, ks).view(*q.shape[:-1], ks)
    return (decode(q, block_scale) * global_scale.reshape(())).to(dtype)


def _split_global(global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """``global_scale`` as a power of two, to go into the weights exactly, and what remains, for the output.

    Without it the sum of huge activations overflows although the scaled result would not.
    """
    bits = global_scale.reshape(()).view(torch.int32)
    exponent = ((bits >> 23 & 0xFF) - 127).clamp(-100, 100)
    power = ((exponent + 127) << 23).view(torch.float32)
    inverse = ((127 - exponent) << 23).view(torch.float32)
    return power, global_scale.reshape(()) * inverse


def nvfp4_linear(
    x: Tensor,
    q: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    power, rest = _split_global(global_scale)
    weight = decode(q, block_scale, wide) * power
    y = x.to(wide) @ weight.t() * rest
    if bias is not None:
        y = y + bias.to(wide)
    if activation == "relu2":
        y = y.relu().square()
    return y.to(x.dtype)


def nvfp4_embedding(
    ids: Tensor, q: Tensor, block_scale: Tensor, global_scale: Tensor, *, dtype: torch.dtype
) -> Tensor:
    n = q.shape[0]
    bad = (ids < 0) | (ids >= n)
    if ids.device.type == "cpu" and bad.any():  # elsewhere the host must not wait for the values
        Check("nvfp4_embedding").fail(f"ids must lie in [0, {n}), got {ids[bad][0].item()}")
    flat = torch.where(bad, 0, ids).flatten().long()
    scale = block_scale.view(torch.uint8)[flat].view(torch.float8_e4m3fn)
    rows = nvfp4_dequantize(q[flat], scale, global_scale, dtype=dtype).view(*ids.shape, q.shape[1] * 2)
    return torch.where(bad.unsqueeze(-1), float("nan"), rows)


# ---------------------------------------------------------------- scale layout


def nvfp4_swizzle_scale(block_scale: Tensor) -> Tensor:
    *batch, rows, cols = block_scale.shape
    padded = torch.zeros(*batch, pad(rows, 128), pad(cols, 4), dtype=torch.uint8, device=block_scale.device)
    padded[..., :rows, :cols] = block_scale.view(torch.uint8)
    # byte ((r / 128 * ceil(cols / 4) + c / 4) * 512 + r % 32 * 16 + r % 128 / 32 * 4 + c % 4) holds scale (r, c)
    tiles = padded.view(*batch, pad(rows, 128) // 128, 4, 32, pad(cols, 4) // 4, 4).transpose(-4, -2)
    return tiles.reshape(padded.shape).view(torch.float8_e4m3fn)


def nvfp4_unswizzle_scale(block_scale: Tensor, rows: int, cols: int) -> Tensor:
    *batch, padded_rows, padded_cols = block_scale.shape
    tiles = block_scale.view(torch.uint8).reshape(*batch, padded_rows // 128, padded_cols // 4, 32, 4, 4)
    padded = tiles.transpose(-4, -2).reshape(block_scale.shape)
    return padded[..., :rows, :cols].contiguous().view(torch.float8_e4m3fn)
