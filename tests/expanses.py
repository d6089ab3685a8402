"""Tensors of more than 2^31 elements, of which next to nothing is touched, for the tests marked slow."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

LIMIT = 2**31
GB = 10**9


@pytest.fixture(autouse=True)
def unpoisoned(_poison):
    """What is not used is not written either: gigabytes of NaN would be."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    yield
    torch.utils.deterministic.fill_uninitialized_memory = True


def needs(gigabytes: float) -> None:
    """Skips the test unless that much memory is free."""
    if DEVICE == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
        free = sum(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if free < gigabytes * GB:
        pytest.skip(f"needs {gigabytes} GB of free memory, has {free / GB:.1f}")


def expanse(*shape, dtype=torch.bfloat16):
    """Memory that is not touched; where the system gives out none that it does not have, the test is skipped."""
    if DEVICE == "cuda":
        needs(math.prod(shape) * dtype.itemsize / GB)
    try:
        return torch.empty(*shape, dtype=dtype, device=DEVICE)
    except RuntimeError as error:
        pytest.skip(f"no {math.prod(shape) * dtype.itemsize / GB:.1f} GB in one piece: {error}")
