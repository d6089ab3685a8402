"""What every test shares: the interpreter switch, poison, fences, the backend fixture, the one tolerance, --prove.

A test module names its operators in ``OPS``; a test that takes ``backend`` runs once for every backend that one of
them has on this machine, with that backend forced.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported

import hypothesis  # noqa: E402
import pytest  # noqa: E402

import n3kernels  # noqa: E402
from n3kernels import _dispatch  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FENCE = 64  # elements of NaN on either side of a fenced tensor

# ---- hypothesis: derandomised and short by default; HYPOTHESIS_PROFILE=long runs ten times as many examples
_CALM = {
    "deadline": None,
    "suppress_health_check": [
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
        hypothesis.HealthCheck.data_too_large,
        hypothesis.HealthCheck.filter_too_much,  # a kernel that takes few of the calls: see PARTIAL
    ],
}
hypothesis.settings.register_profile("quick", max_examples=20, derandomize=True, database=None, **_CALM)
hypothesis.settings.register_profile("long", max_examples=200, **_CALM)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def _poison():
    """Every torch.empty, in Python and in C++, comes back full of NaN: unwritten output shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def fenced(t: torch.Tensor) -> torch.Tensor:
    """`t` between two fences of NaN (integers: of the largest value): a read past either end shows in the result."""
    poison = float("nan") if t.dtype.is_floating_point else torch.iinfo(t.dtype).max
    if t.dtype == torch.float8_e4m3fn:
        return fenced(t.view(torch.uint8)).fill_(0x7F).copy_(t.view(torch.uint8)).view(t.dtype)
    room = torch.full((t.numel() + 2 * FENCE,), poison, dtype=t.dtype, device=t.device)
    return room[FENCE : FENCE + t.numel()].copy_(t.flatten()).view(t.shape)


def assert_close_to(out: torch.Tensor, truth: torch.Tensor, acc: float = 1e-5, scale: torch.Tensor | None = None):
    """`out` is `truth` rounded once to out's dtype, give or take `acc`; per element: no large value hides a small one.

    `scale` is what `acc` is relative to where the truth is a sum that may cancel: the sum of the terms' magnitudes.
    """
    assert out.shape == truth.shape, f"shape {tuple(out.shape)}, expected {tuple(truth.shape)}"
    assert not out.isnan().any(), "NaN: an output element was not written, or an input was read out of range"
    half_ulp = torch.finfo(out.dtype).eps / 2 if out.dtype in (torch.float16, torch.bfloat16) else 0.0
    truth = truth.to(torch.float64)
    room = half_ulp * truth.abs() + acc * (truth.abs() + 1 if scale is None else scale)
    if out.dtype == torch.float16:
        room = room + 2.0**-25  # half a unit in the last place of a subnormal
    error = (out.to(torch.float64) - truth).abs()
    bad = (error > room).nonzero()
    if bad.numel():
        i = tuple(bad[0].tolist())
        raise AssertionError(
            f"{len(bad)} of {out.numel()} off; first at {list(i)}: got {out[i].item()}, truth {truth[i].item()}; "
            f"largest error {error.max().item():.3g}"
        )


def assert_same_bits(a: torch.Tensor, b: torch.Tensor):
    """Equal byte for byte, NaN included."""
    assert a.dtype == b.dtype and a.shape == b.shape, f"{a.dtype}{tuple(a.shape)} against {b.dtype}{tuple(b.shape)}"
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    bad = (a != b).nonzero()
    assert bad.numel() == 0, f"{len(bad)} of {a.numel()} bytes differ, the first at byte {bad[0].item()}"


def assert_invariant(backend: str, a: torch.Tensor, b: torch.Tensor):
    """The same bits from every kernel. PyTorch's own vectorised functions, of which a reference is made, round a row's
    last elements differently when it sits elsewhere in memory: there, the same value to float32 rounding."""
    if backend != "reference":
        assert_same_bits(a, b)
    else:
        torch.testing.assert_close(a, b, rtol=1.6e-2 if a.dtype == torch.bfloat16 else 2e-3, atol=1e-5, equal_nan=True)


# ---- backends


def backends_here(names) -> list[str]:
    """The backends that at least one of these operators has on this machine."""
    arch = _dispatch._cuda_arch() if DEVICE == "cuda" else "cpu"
    ops = [_dispatch.OPS[name] for name in names]
    return [b for b in n3kernels.BACKENDS if any(not _dispatch.why_not(op, b, DEVICE, arch) for op in ops)]


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        names = metafunc.module.OPS
        marker = metafunc.definition.get_closest_marker("op")
        metafunc.parametrize("backend", backends_here(marker.args if marker else names), indirect=True)


# Backends with kernels that take a part of an operator's calls, such as one dtype. What they refuse by their predicate
# is no failure of theirs: the test is skipped, or hypothesis draws another example.
PARTIAL = ("cuda",)


@pytest.fixture
def backend(request, monkeypatch):
    if request.param in PARTIAL:
        monkeypatch.setattr(_dispatch, "_forced", _only_what_it_takes)
    with n3kernels.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _which(request, monkeypatch):
    """The same for a test that forces the backend by itself, named ``which``."""
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("which") in PARTIAL:
        monkeypatch.setattr(_dispatch, "_forced", _only_what_it_takes)


_forced = _dispatch._forced


def _only_what_it_takes(op, backend, device, *args, **kwargs):
    predicate = op.supports.get(backend)
    reason = predicate and predicate(*args, **kwargs)
    if reason and hypothesis.currently_in_test_context():
        hypothesis.reject()
    if reason:
        pytest.skip(f"{backend}: {reason}")
    return _forced(op, backend, device, *args, **kwargs)


# ---- the record of what was proven where


def pytest_addoption(parser):
    parser.addoption("--prove", action="store_true", help="on a GPU: record which operators' tests passed here")
    parser.addoption("--prove-to", default=None, help="file of the record (default: n3kernels/proven.json)")


_passed: Counter = Counter()
_failed: set = set()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    params = getattr(getattr(item, "callspec", None), "params", {})
    tested = params.get("backend", params.get("which"))
    if tested not in n3kernels.BACKENDS:
        return
    if report.failed and tested in PARTIAL and call.excinfo.errisinstance(hypothesis.errors.Unsatisfiable):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, "the kernel takes none of the examples")
    marker = item.get_closest_marker("op")
    keys = [(name, tested) for name in (marker.args if marker else getattr(item.module, "OPS", ()))]
    if report.failed:
        _failed.update(keys)
    elif report.when == "call" and report.passed and "backend" in params:  # `which` may stand for several operators
        _passed.update(keys)


def pytest_sessionfinish(session):
    if not session.config.getoption("--prove") or DEVICE != "cuda":
        return
    path = Path(session.config.getoption("--prove-to") or Path(n3kernels.__file__).parent / "proven.json")
    record = json.loads(path.read_text()) if path.is_file() else {}
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    run = {"device": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat()}
    run["commit"] = commit or "unknown"
    keep_record(record.setdefault(_dispatch._cuda_arch(), {}), _passed, _failed, was_whole(session), run)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def was_whole(session) -> bool:
    """Whether no test was left out by name and none was left undone."""
    chosen = session.config.getoption("keyword") or session.config.getoption("markexpr") not in ("", "not slow")
    chosen = chosen or any("::" in arg for arg in session.config.args)
    return not (chosen or session.shouldstop or session.shouldfail or session.exitstatus not in (0, 1))


def keep_record(ops: dict, passed: Counter, failed: set, whole: bool, run: dict) -> None:
    """Into ``{operator: {backend: ...}}``, what was proven: a part of the tests proves nothing, but disproves."""
    for name, which in sorted(failed | set(passed)):
        backends = ops.setdefault(name, {})
        if whole or (name, which) in failed:
            backends.pop(which, None)
        if whole and (name, which) not in failed and which in ("cuda", "triton"):
            backends[which] = {**run, "passed": passed[name, which]}
