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


def encode_scale(x: np.ndarray, global_scale: float | None, normal: float) -> tuple[np.float32, np.float32]:
    """(S_enc, decode scale)."""
    one = np.float32(1)
    if global_scale is not None:
        given = np.float32(global_scale)
        return (one if given == 0 else np.minimum(one / given, FLT_MAX) or one), given
    finite = np.abs(x[np.isfinite(x)])
    amax = finite.max() if finite.size else np.float32(0)
    s_enc = one if amax == 0 else np.minimum(np.float32(normal) / amax, FLT_MAX)
    return s_enc, one / s_enc


def _codes(block: np.ndarray, scale: np.float32, inv: np.float32) -> np.ndarray:
    if scale == 0:
        return np.zeros(16, np.int64)
    v = block * np.minimum(np.float32(1) / (scale * inv), FLT_MAX)
    return nearest(MAGNITUDES, np.abs(v)) + 8 * np.signbit(v)


def _error(block: np.ndarray, codes: np.ndarray, scale: np.float32, inv: np.float32) -> np.float32:
    total = np.float32(0)
    for x, code in zip(block, codes, strict=True):
        total += np.abs(np.float32(E2M1[code]) * scale * inv - x)
    return total


def quantize(x: torch.Tensor, global_scale: float | None, four_over_six: bool):
    """(codes [..., K], scale bytes [..., K/16], global scale): one block after the other."""
    with np.errstate(all="ignore"):
        wide = x.detach().cpu().float().numpy()
        s_enc, decode = encode_scale(wide, global_scale, 1536 if four_over_six else 2688)
        inv = np.float32(1) / s_enc
        codes, scales = [], []
        for block in wide.reshape(-1, 16):
            if not np.isfinite(block).all():
                codes.append(np.zeros(16, np.int64))
                scales.append(0x7F)
                continue
            amax = np.abs(block).max()
            if four_over_six:
                base = amax / np.float32(6) * s_enc
                candidates = [base, base * np.float32(1.5)]
            else:
                candidates = [amax * (s_enc / np.float32(6))]
            tried = []
            for candidate in candidates:
                byte = int(nearest(_POSITIVE, candidate))
                scale = np.float32(E4M3[byte])
                own = _codes(block, scale, inv)
                tried.append((_error(block, own, scale, inv) if four_over_six else 0, byte, own))
            best = tried[-1] if tried[-1][0] < tried[0][0] else tried[0]
            scales.append(best[1])
            codes.append(best[2])
    shape = x.shape[:-1]
    codes = np.array(codes, np.int64).reshape(x.shape)
    return codes, np.array(scales, np.uint8).reshape(*shape, x.shape[-1] // 16), decode


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
