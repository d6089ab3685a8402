"""What every benchmark shares: the providers, the `measure` fixture, the selection of sizes, the facts of the run.

A benchmark is a pytest-benchmark test: one group for an operator at one size, one test per provider. Providers are our
backends on this machine and plain torch. Unmarked sizes also run in the test suite, once and without a clock
(``--benchmark-disable``); sizes marked ``timed`` do not, and sizes marked ``full`` wait for ``--full``.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch

import n3kernels
from n3kernels import _dispatch

from . import roofs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUND_SECONDS = 5e-3  # a round is long beside the clock's resolution and short beside the machine's moods


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="benchmark every published size, not only the default ones")
    parser.addoption("--budget", type=float, default=1.0, help="seconds of timing for each test (default: 1)")


def pytest_configure(config):
    config.n3_load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # of others: this run has not begun
    config.addinivalue_line("markers", "full: a size that is benchmarked with --full only")
    config.addinivalue_line("markers", "timed: a size that is left out under --benchmark-disable")


def pytest_collection_modifyitems(config, items):
    full, untimed = config.getoption("--full"), config.getoption("--benchmark-disable")
    out = [i for i in items if _is_ours(i) and _left_out(i, full, untimed)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [i for i in items if i not in set(out)]


def _is_ours(item) -> bool:
    return item.path.name.startswith("bench_")


def _left_out(item, full: bool, untimed: bool) -> bool:
    marks = {mark.name for mark in item.iter_markers()}
    return ("full" in marks and not full) or (untimed and bool(marks & {"full", "timed"}))


def sizes(values: Sequence, quick: Sequence, full: Sequence = ()) -> list:
    """Parameters in three steps: ``quick`` always, ``full`` with --full only, the others unless nothing is timed."""

    def mark(value):
        return () if value in quick else pytest.mark.full if value in full else pytest.mark.timed

    return [pytest.param(value, marks=mark(value)) for value in values]


# ---- providers


def providers(op: str, *baselines: str) -> list[str]:
    """Our backends that have a kernel for ``op`` here, then the baselines. The interpreter is no provider."""
    arch = _dispatch._cuda_arch() if DEVICE == "cuda" else "cpu"
    entry = _dispatch.OPS[op]
    ours = [b for b in ("cuda", "triton", "cpu", "reference") if not _dispatch.why_not(entry, b, DEVICE, arch)]
    return [b for b in ours if b != "triton" or DEVICE == "cuda"] + list(baselines)


def use_provider(op: str, provider: str):
    """Forces a backend of ours, except where it is the default: a forced call takes a detour through Python."""
    if provider not in n3kernels.BACKENDS or n3kernels.explain(op, device=DEVICE).backend == provider:
        return contextlib.nullcontext()
    return n3kernels.use_backend(provider)


# ---- timing


class Ring:
    """Calls of ``fn`` over rotating copies of its arguments, more in all than the last-level cache holds.

    A decoding step reads every weight of the model once, so a weight that is still in the cache from the call before
    is a number nobody gets to see. ``pedantic(ring, iterations=ring.n)`` makes ``n`` calls a round. On a GPU these are
    one CUDA graph: the first call replays it, the last waits for it, and the host is not in the number. Without
    ``graph``, for code that cannot be captured, they are launched one by one.
    """

    def __init__(self, fn: Callable, args: Sequence, graph: bool = True):
        size = sum(a.numel() * a.element_size() for a in args if isinstance(a, torch.Tensor))
        # Caches do not evict strictly by age: of twice their size, half may still be there.
        room = min(4 * roofs.cache_bytes(DEVICE), roofs.memory_bytes(DEVICE) // 4)
        copies = max(2, min(4096, -(-room // max(size, 1))))
        sets = [args] + [[a.clone() if isinstance(a, torch.Tensor) else a for a in args] for _ in range(copies - 1)]
        self.calls = [partial(fn, *s) for s in sets]
        self.i, self.n, self.graph = 0, 1, None
        if DEVICE == "cuda":
            self.n = min(copies, 256)
            if graph:
                self._capture()

    def _capture(self) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # first calls allocate handles and workspaces, which a capture must not
            for call in self.calls[:3]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for call in self.calls[: self.n]:
                call()

    def __call__(self) -> None:
        if self.graph is None:
            self.calls[self.i % len(self.calls)]()
        elif self.i % self.n == 0:
            self.graph.replay()
        self.i += 1
        if DEVICE == "cuda" and self.i % self.n == 0:
            torch.cuda.synchronize()

    def rounds(self, budget: float) -> tuple[int, int]:
        """Sets the calls of a round, from the time of a few; returns how many rounds fit the budget, and warm-ups."""
        seconds = self._time_of(self.n)
        if seconds < budget / 10:
            seconds = self._time_of(3 * self.n)
        if DEVICE != "cuda":
            self.n = max(1, min(10_000, int(ROUND_SECONDS / seconds)))
        fit = int(budget / (seconds * self.n))
        return max(5, min(100, fit)), 2 if fit >= 5 else 0

    def _time_of(self, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            self()
        return (time.perf_counter() - start) / calls


@pytest.fixture
def measure(benchmark, request):
    """Checks a provider against the truth, then times it; see the parameters of `run`."""
    budget = request.config.getoption("--budget")

    def run(
        op: str,
        provider: str,
        fn: Callable,
        args: Sequence,
        truth: torch.Tensor,
        *,
        group: str,
        bytes: int,
        flops: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        tolerance: float = 2.5e-3,
        value: Callable[..., torch.Tensor] = lambda out: out,
    ) -> None:
        """Times ``fn(*args)`` as ``provider`` of ``group``.

        ``bytes`` is the least traffic of the call, each input read once and each output written once, ``dtype`` the
        arithmetic that could serve it; both say how far from the machine's limit it is. ``tolerance`` is the relative
        root-mean-square error that ``value(out)`` may have: 2.5e-3 for a result rounded once to bfloat16.
        """
        with use_provider(op, provider):
            out = value(fn(*args)).double()
            error = ((out - truth).norm() / truth.double().norm()).item()
            assert error <= tolerance, f"{provider}: relative error {error:.3g} is above {tolerance:.3g}"
            largest = (out - truth).abs().max().item()
            del out
            benchmark.group = group
            benchmark.extra_info.update(
                op=op, provider=provider, bytes=bytes, flops=flops, dtype=str(dtype).removeprefix("torch."),
                max_error=largest, relative_error=error,
            )  # fmt: skip
            if benchmark.disabled:
                benchmark.pedantic(fn, args)
                return
            ring = Ring(fn, args, graph=provider != "reference")  # which makes its tables on the host
            rounds, warmup = ring.rounds(budget)
            ring.i = 0
            benchmark.pedantic(ring, iterations=ring.n, rounds=rounds, warmup_rounds=warmup)
            limit = roofs.roofs(DEVICE).percent(bytes, flops, benchmark.stats.stats.median, dtype)
            benchmark.extra_info.update(roof_percent=limit)

    return run


# ---- facts of the run


def pytest_benchmark_update_machine_info(config, machine_info):
    cpu = machine_info.pop("cpu", {})
    machine_info["n3"] = {
        "kind": DEVICE,
        "device": roofs.device_name(DEVICE),
        "cpu": {k: cpu.get(k) for k in ("brand_raw", "family", "model", "stepping", "count")},
        "isa": os.environ.get("N3_CPU_ISA") or "native",
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": config.n3_load,
        "torch": torch.__version__,
        "n3kernels": n3kernels.__version__,
        "cache_bytes": roofs.cache_bytes(DEVICE),
        "roofs": roofs.roofs(DEVICE).as_dict(),
        **(_gpu_facts() if DEVICE == "cuda" else {}),
    }


def _gpu_facts() -> dict:
    p = torch.cuda.get_device_properties(0)
    facts = {"arch": f"sm_{p.major}{p.minor}", "cuda": torch.version.cuda, "multiprocessors": p.multi_processor_count}
    with contextlib.suppress(Exception):  # clocks and driver are for the reader; without pynvml there are none
        facts.update(sm_mhz=torch.cuda.clock_rate(), watts=torch.cuda.power_draw() / 1000)
    return facts
