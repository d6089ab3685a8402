"""The definition of nvfp4_repack in plain PyTorch: where each code and scale of NVFP4 weights lies in the blob.

A tile is 16 rows by 64 k: 512 bytes of codes, then 64 of scales, in the order in which the tensor cores of sm_80 and
later take 16 x 16 weights as operand a. Rows of tiles lie one after the other, each with 64 bytes behind its tiles of
which the first 16 tell, a byte a row, whether a scale of the row is NaN. What lies outside the weights is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference

__all__ = ["blob_shape", "nvfp4_linear_packed", "nvfp4_repack", "unpack"]

ROWS, DEPTH, CODES, SCALES, MARKS = 16, 64, 512, 64, 64  # a tile's rows and k; bytes of its parts, of a row's marks
# Bits 0..2 (magnitude) and 3 (sign) of the four codes in the lower halves of operand a's registers; of the upper
# halves, 16 places on. Four rotations and five masks take a word apart (csrc/nvfp4/repack_plan.h: codes_bf16).
HOME = ((24, 25, 26, 1), (28, 29, 30, 5), (2, 3, 4, 11), (6, 31, 0, 7))
NAN = 0xFF  # a scale of the blob


def blob_shape(n: int, k: int) -> tuple[int, int]:
    """Shape of the blob of ``[n, k]`` weights, in bytes."""
    return (n + ROWS - 1) // ROWS, (k + DEPTH - 1) // DEPTH * (CODES + SCALES) + MARKS


# ---------------------------------------------------------------- scales: e5m3, biased by 21


def _pack_scale(scale: Tensor) -> Tensor:
    """Bits 14..7 of the float16 ``2^6 |scale|``; NaN is 0xFF."""
    bits = (scale.view(torch.uint8).int() & 0x7F).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float16)
    packed = (bits * 64).view(torch.int16).int() >> 7 & 0xFF
    return torch.where(bits.isnan(), NAN, packed)


def _unpack_scale(packed: Tensor) -> Tensor:
    value = ((packed << 7).to(torch.int16).view(torch.float16) / 64).to(torch.float8_e4m3fn)
    return torch.where(packed == NAN, 0x7F, value.view(torch.uint8)).to(torch.uint8).view(torch.float8_e4m3fn)


# ---------------------------------------------------------------- the blob


def _placed(t: Tensor, rows: int, columns: int) -> Tensor:
    """``t`` with zeros below and to the right."""
    return torch.nn.functional.pad(t, (0, columns - t.shape[1], 0, rows - t.shape[0]))


def nvfp4_repack(q: Tensor, block_scale: Tensor) -> Tensor:
    n, k = q.shape[0], q.shape[1] * 2
    rows, row_bytes = blob_shape(n, k)
    tiles = (row_bytes - MARKS) // (CODES + SCALES)
    codes = torch.stack([q & 15, q >> 4], -1).view(n, k).int()
    byte = block_scale.view(torch.uint8).int().repeat_interleave(reference.BLOCK, 1)
    sign = (codes ^ byte >> 4) & 8  # a negative scale's sign goes into the codes
    codes = sign | torch.where(byte & 0x7F == 0, 0, codes & 7)  # and the zero of a scale into their magnitudes

    # row 8 h + g, k 16 j + 8 e + 2 t + half of a tile: register 2 e + h of word j of lane 4 g + t
    codes = _placed(codes, ROWS * rows, DEPTH * tiles).view(rows, 2, 8, tiles, 4, 2, 4, 2)
    codes = codes.permute(0, 3, 2, 6, 4, 5, 1, 7).reshape(rows, tiles, 128, 4, 2).long()
    words = torch.zeros(rows, tiles, 128, dtype=torch.long, device=q.device)
    for reg in range(4):
        for half in range(2):
            for bit in range(4):
                words |= (codes[..., reg, half] >> bit & 1) << (HOME[reg][bit] + 16 * half) % 32
    words = torch.stack([words >> 8 * i & 0xFF for i in range(4)], -1).flatten(2)

    scale = _pack_scale(block_scale)
    marks = (scale == NAN).any(1, keepdim=True).int()
    scale = _placed(scale, ROWS * rows, 4 * tiles).view(rows, 2, 8, tiles, 4).permute(0, 3, 2, 4, 1).flatten(2)
    marks = _placed(_placed(marks, ROWS * rows, 1).view(rows, ROWS), rows, MARKS)
    return torch.cat([torch.cat([words, scale], -1).flatten(1), marks], 1).to(torch.uint8)


def unpack(blob: Tensor, n: int, k: int) -> tuple[Tensor, Tensor]:
    """``q`` and ``block_scale``: the values that were packed, no scale negative, no scale zero over a magnitude."""
    rows, row_bytes = blob_shape(n, k)
    tiles = (row_bytes - MARKS) // (CODES + SCALES)
    parts = blob[:, : row_bytes - MARKS].reshape(rows, tiles, CODES + SCALES).int()
    words = parts[..., :CODES].reshape(rows, tiles, 128, 4).long()
    words = sum(words[..., i] << 8 * i for i in range(4))
    codes = torch.zeros(rows, tiles, 128, 4, 2, dtype=torch.int32, device=blob.device)
    for reg in range(4):
        for half in range(2):
            for bit in range(4):
                codes[..., reg, half] |= (words >> (HOME[reg][bit] + 16 * half) % 32 & 1).int() << bit
    codes = codes.view(rows, tiles, 8, 4, 4, 2, 2, 2).permute(0, 6, 2, 1, 4, 5, 3, 7)
    codes = codes.reshape(ROWS * rows, DEPTH * tiles)[:n, :k]
    scale = parts[..., CODES:].reshape(rows, tiles, 8, 4, 2).permute(0, 4, 2, 1, 3)
    scale = scale.reshape(ROWS * rows, 4 * tiles)[:n, : k // reference.BLOCK]
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), _unpack_scale(scale)


def nvfp4_linear_packed(
    x: Tensor,
    blob: Tensor,
    global_scale: Tensor,
    n: int,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    return reference.nvfp4_linear(x, *unpack(blob, n, x.shape[-1]), global_scale, bias, activation)
