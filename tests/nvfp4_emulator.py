"""What the arguments of the nvfp4 kernels under tests/cuda_emulator are made of."""

from __future__ import annotations

import ctypes

import torch
from conftest import FENCE

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of the emulator's codes


def pointer(t: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def size(v: int) -> ctypes.c_int64:
    return ctypes.c_int64(v)


def room(shape, dtype):
    """Uninitialised memory between fences, as a GPU's allocator would hand it out: (tensor, check)."""
    whole = torch.full((torch.Size(shape).numel() + 2 * FENCE,), 0x7F, dtype=torch.uint8)
    whole = whole.repeat_interleave(dtype.itemsize).view(dtype)
    inside = whole[FENCE : whole.numel() - FENCE].view(shape)

    def untouched():
        outside = torch.cat([whole[:FENCE], whole[whole.numel() - FENCE :]])
        assert (outside.view(torch.uint8) == 0x7F).all(), "written out of range"

    return inside, untouched


def e4m3(t: torch.Tensor) -> torch.Tensor:
    return t.to(torch.uint8).view(torch.float8_e4m3fn)
