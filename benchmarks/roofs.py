"""What this machine can do at most: bytes per second from memory and floating-point operations per second.

A CPU is measured, with the instruction set and the threads that the benchmarks run with: the fastest of a few plain
reads and copies of memory larger than its caches, and large matrix products. For a GPU the data sheet is the limit;
a measured copy stands beside it.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch

__all__ = ["Roofs", "cache_bytes", "device_name", "memory_bytes", "roofs"]

# Dense peaks from the data sheets: memory bytes/s, FLOP/s of bf16 tensor cores, of fp32 outside them.
GPUS = {
    "H100 80GB HBM3": (3.35e12, 989e12, 67e12),
    "H100 PCIe": (2.04e12, 756e12, 51e12),
    "H100 NVL": (3.94e12, 835e12, 60e12),
    "H200": (4.8e12, 989e12, 67e12),
    "B200": (8.0e12, 2250e12, 75e12),
    "GB200": (8.0e12, 2500e12, 80e12),
    "B300": (8.0e12, 2250e12, 75e12),
    "RTX PRO 6000": (1.79e12, 503e12, 126e12),
    "RTX 5090": (1.79e12, 210e12, 105e12),
    "A100-SXM4-80GB": (2.04e12, 312e12, 19.5e12),
    "L40S": (0.86e12, 362e12, 91.6e12),
    "RTX 4090": (1.01e12, 165e12, 82.6e12),
}


@dataclass(frozen=True)
class Roofs:
    """The limits of one machine."""

    bandwidth: float  # bytes/s
    flops: dict[str, float] = field(default_factory=dict)  # dtype -> FLOP/s
    source: str = "measured"
    copy: float = 0.0  # bytes/s of a measured copy, reads and writes counted

    def seconds(self, bytes: float, flops: float = 0, dtype: torch.dtype | str = "float32") -> float:
        """The least time for this much work: what the slower of memory and arithmetic needs."""
        peak = self.flops.get(str(dtype).removeprefix("torch."), 0) or max(self.flops.values(), default=0)
        return max(bytes / self.bandwidth, flops / peak if peak else 0)

    def percent(self, bytes: float, flops: float, seconds: float, dtype: torch.dtype | str = "float32") -> float:
        """100: as fast as the machine can be. Above 100 the data was not in memory but in a cache."""
        return 100 * self.seconds(bytes, flops, dtype) / seconds

    def as_dict(self) -> dict:
        return asdict(self)


@cache
def roofs(device: str) -> Roofs:
    """The limits of ``device`` ("cpu", "cuda"), measured once per process: about a second."""
    return _gpu_roofs() if device == "cuda" else _cpu_roofs()


def device_name(device: str) -> str:
    """The name of the processor or GPU, as tables show it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def cache_bytes(device: str) -> int:
    """Size of the last-level cache: buffers together larger than this do not stay in it."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or 32 << 20
    except (ValueError, OSError):
        return 32 << 20


def memory_bytes(device: str) -> int:
    """Size of the device's memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return 8 << 30


def _best(fn: Callable[[], object], device: str = "cpu", rounds: int = 5) -> float:
    """The fastest of a few calls, in seconds: a limit is what the machine reaches undisturbed."""
    times = []
    for _ in range(rounds + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _cpu_roofs() -> Roofs:
    half = 1 << 27 if cache_bytes("cpu") > 64 << 20 else 1 << 25
    x, y = torch.ones(half), torch.ones(half)
    copy = 8 * half / _best(lambda: y.copy_(x))
    reads = (4 * half / _best(x.sum), 8 * half / _best(lambda: torch.dot(x, y)))
    flops = {name: _matmul_rate(getattr(torch, name)) for name in ("float32", "bfloat16", "float16")}
    # A product of 16-bit numbers may be computed in float32, so it can never be the slower limit.
    flops = {name: max(rate, flops["float32"]) for name, rate in flops.items()}
    return Roofs(max(copy, *reads), flops, "measured", copy)


def _matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a square product that takes about 50 ms, found by doubling: some dtypes have no fast kernel."""
    n = 256
    while True:
        a = torch.rand(n, n).to(dtype)
        seconds = _best(lambda a=a: a @ a, rounds=3)
        if seconds > 0.04 or n >= 4096:
            return 2 * n**3 / seconds
        n *= 2


def _gpu_roofs() -> Roofs:
    x = torch.ones(1 << 28, device="cuda")
    y = torch.empty_like(x)
    copy = 2 * x.numel() * 4 / _best(lambda: y.copy_(x), "cuda")
    name = torch.cuda.get_device_name()
    # The longest name that fits: "GB200" before "B200".
    for key in sorted(GPUS, key=len, reverse=True):
        if key in name:
            bandwidth, half, single = GPUS[key]
            return Roofs(bandwidth, {"bfloat16": half, "float16": half, "float32": single}, "data sheet", copy)
    a = torch.rand(8192, 8192, device="cuda")
    rates = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        b = a.to(dtype)
        rates[str(dtype).removeprefix("torch.")] = 2 * 8192**3 / _best(lambda b=b: b @ b, "cuda")
    return Roofs(copy, rates, "measured", copy)
