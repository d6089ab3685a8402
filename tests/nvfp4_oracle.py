"""NVFP4 by brute force in NumPy: nearest of a list of values, ties to the even code. Nothing here is n3kernels' own."""

from __future__ import annotations

from unittest import mock

import numpy as np
import torch
from conftest import DEVICE, fenced

FLT_MAX = np.finfo(np.float32).max
MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate([MAGNITUDES, -MAGNITUDES])


def _e4m3_value(byte: int) -> float:
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    magnitude = (8 + mantissa) * 2.0 ** (exponent - 10) if exponent else mantissa * 2.0**-9
    return -magnitude if byte & 0x80 else magnitude


E4M3 = np.array([_e4m3_value(byte) for byte in range(256)])
_POSITIVE = E4M3[:127]


def nearest(values: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Index of the nearest of the ascending `values` to each v >= 0, the even one of two; above the last, the last."""
    v = np.minimum(v.astype(np.float64), values[-1])
    upper = np.clip(np.searchsorted(values, v), 1, len(values) - 1)
    below, above = v - values[upper - 1], values[upper] - v
    take_upper = (above < below) | ((above == below) & (upper % 2 == 0))
    return np.where(take_upper, upper, upper - 1)


def encode_scale(
    x: np.ndarray, global_scale: float | None, normal: float
) -> tuple[np.float32, np.float32, np.float32]:
    """(S_enc, decode scale, amax)."""
    one = np.float32(1)
    if global_scale is not None:
        given = np.float32(global_scale)
        s_enc = np.fmax(np.fmin(one / given, FLT_MAX), -FLT_MAX)  # NaN counts as FLT_MAX
        return (one if given == 0 else s_enc or one), given, given * np.float32(normal)
    finite = np.abs(x[np.isfinite(x)])
    amax = finite.max() if finite.size else np.float32(0)
    s_enc = one if amax == 0 else np.minimum(np.float32(normal) / amax, FLT_MAX)
    return s_enc, one / s_enc, amax


def _codes(tile: np.ndarray, scale: np.float32, inv: np.float32, words: np.ndarray | None) -> np.ndarray:
    if scale == 0:
        return np.zeros(tile.shape, np.int64)
    v = tile * np.minimum(np.float32(1) / (scale * inv), FLT_MAX)
    a = np.minimum(np.abs(v).astype(np.float64), 6)
    if words is None:
        return nearest(MAGNITUDES, a) + 8 * np.signbit(v)
    lower = np.searchsorted(MAGNITUDES, a, "right") - 1
    upper = np.minimum(lower + 1, 7)
    fraction = (a - MAGNITUDES[lower]) / np.maximum(MAGNITUDES[upper] - MAGNITUDES[lower], 0.5)
    return np.where(words * 2.0**-32 >= fraction, lower, upper) + 8 * np.signbit(v)


def _error(tile: np.ndarray, codes: np.ndarray, scale: np.float32, amax: np.float32, metric: str) -> np.float32:
    sums = []
    for xs, cs in zip(tile, codes, strict=True):
        total = np.float32(0)
        for x, code in zip(xs, cs, strict=True):
            d = np.float32(E2M1[code]) * scale * amax / np.float32(1536) - x
            total += np.abs(d) if metric == "mae" else d * d
        sums.append(total)
    while len(sums) > 1:
        half = len(sums) // 2
        sums = [sums[i] + sums[i + half] for i in range(half)]
    return sums[0]


def philox_words(count: int, key: int, offset: int) -> np.ndarray:
    """Word e & 3 of Philox4x32-10 under counter (e >> 2, offset) for e = 0 ... count - 1, as float64."""
    mask, words = 0xFFFFFFFF, []
    for block in range((count + 3) // 4):
        c = [block & mask, block >> 32, offset & mask, offset >> 32 & mask]
        k = [key & mask, key >> 32 & mask]
        for _ in range(10):
            p, r = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
            c = [r >> 32 ^ c[1] ^ k[0], r & mask, p >> 32 ^ c[3] ^ k[1], p & mask]
            k = [(k[0] + 0x9E3779B9) & mask, (k[1] + 0xBB67AE85) & mask]
        words += c
    return np.array(words[:count], np.float64)


def _tile(tile: np.ndarray, scales: tuple, six: bool, metric: str, words: np.ndarray | None):
    """(codes, scale byte) of one tile of 1 or 16 rows."""
    s_enc, _, tensor_amax = scales
    if not np.isfinite(tile).all():
        return np.zeros(tile.shape, np.int64), 0x7F
    inv, amax = np.float32(1) / s_enc, np.abs(tile).max()
    if six:
        base = amax / np.float32(6) * s_enc
        candidates = [base, base * np.float32(1.5)]
    else:
        candidates = [amax * (s_enc * (np.float32(1) / np.float32(6)))]
    tried = []
    for candidate in candidates:
        byte = int(nearest(_POSITIVE, candidate))
        scale = np.float32(E4M3[byte])
        plain = _codes(tile, scale, inv, None)
        error = _error(tile, plain, scale, tensor_amax, metric) if six else 0
        tried.append((error, byte, plain if words is None else _codes(tile, scale, inv, words)))
    _, byte, codes = tried[-1] if tried[-1][0] < tried[0][0] else tried[0]
    return codes, byte


def quantize(
    x: torch.Tensor,
    global_scale=None,
    four_over_six: bool = False,
    *,
    metric: str = "mae",
    per_row: bool = False,
    square: bool = False,
    seed: tuple[int, int] | None = None,
):
    """(codes [..., K], scale bytes [..., K/16], global scale): one block after the other."""
    normal, high, k = 1536 if four_over_six else 2688, 16 if square else 1, x.shape[-1]
    with np.errstate(all="ignore"):
        wide = x.detach().cpu().float().numpy().reshape(x.numel() // k if k else 0, k)
        words = None if seed is None else philox_words(wide.size, *seed).reshape(wide.shape)
        if per_row:
            of_row = [encode_scale(row, g, normal) for row, g in zip(wide, _each(global_scale, len(wide)), strict=True)]
        else:
            of_row = [encode_scale(wide, global_scale, normal)] * len(wide)
        codes, scales = np.zeros(wide.shape, np.int64), np.zeros((len(wide), k // 16), np.uint8)
        for r in range(0, len(wide), high):
            for c in range(k // 16):
                at = np.s_[r : r + high, 16 * c : 16 * c + 16]
                drawn = None if words is None else words[at]
                codes[at], scales[r : r + high, c] = _tile(wide[at], of_row[r], four_over_six, metric, drawn)
        if per_row:
            decode = np.array([decode for _, decode, _ in of_row], np.float32).reshape(x.shape[:-1])
        else:
            decode = encode_scale(wide, global_scale, normal)[1]
    return codes.reshape(x.shape), scales.reshape(*x.shape[:-1], k // 16), decode


def _each(global_scale, rows: int) -> list:
    return [None] * rows if global_scale is None else np.asarray(global_scale, np.float32).reshape(-1).tolist()


def unpack(q: torch.Tensor) -> np.ndarray:
    q = q.cpu().numpy()
    return np.stack([q & 15, q >> 4], -1).reshape(*q.shape[:-1], q.shape[-1] * 2)


def decode(q: torch.Tensor, block_scale: torch.Tensor, global_scale: float | torch.Tensor = 1.0) -> torch.Tensor:
    """The value in float64."""
    scale = E4M3[block_scale.contiguous().view(torch.uint8).cpu().numpy()]
    value = torch.from_numpy(E2M1[unpack(q)] * np.repeat(scale, 16, -1))
    return value.to(q.device) * torch.as_tensor(global_scale, dtype=torch.float64, device=q.device)


# ---- random weights


def e4m3(scale_bytes: torch.Tensor) -> torch.Tensor:
    return scale_bytes.to(torch.uint8).to(DEVICE).view(torch.float8_e4m3fn)


def weights(n: int, k: int, global_scale: float = 0.01, first: int = 0, last: int = 0x7E):
    """Random codes, block scales between two bytes, and the global scale, all between fences of NaN."""
    q = fenced(torch.randint(256, (n, k // 2), dtype=torch.uint8).to(DEVICE))
    block_scale = fenced(e4m3(torch.randint(first, last + 1, (n, k // 16))))
    return q, block_scale, torch.tensor(global_scale, device=DEVICE)


# ---- opcheck


def opcheck(op, args, kwargs=None):
    """`torch.library.opcheck`, whose schema test compares arguments by `allclose`, which PyTorch lacks for float8."""
    allclose = torch.allclose

    def same(a, b, *rest, **options):
        if a.dtype == torch.float8_e4m3fn:
            return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        return allclose(a, b, *rest, **options)

    with mock.patch.object(torch, "allclose", same):
        torch.library.opcheck(op, args, kwargs)
