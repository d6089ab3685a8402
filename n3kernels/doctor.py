"""What ``n3kernels doctor`` reports: facts, the backend of every operator, and a check of each on a small call."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from . import BACKENDS, __version__, _dispatch, use_backend
from ._samples import sample
from ._truth import Deviation, compare

__all__ = ["check", "describe", "facts", "prove", "report", "standing", "why_not_prove"]

HERE = Path(__file__).parent
MEASURES = ("largest error", "relative", "unequal integers")  # relative: to the largest value
TOLERANCE = 1e-5  # relative to the largest value; the samples are float32


# ---------------------------------------------------------------- facts


def facts() -> dict[str, str]:
    """What to know about this installation and machine, in the order in which it is shown."""
    archs = ", ".join(_dispatch.build_archs()) or "the CPU only"
    found = {
        "n3kernels": f"{__version__}, built for {archs}",
        "build": ", ".join(f"{key} {value}" for key, value in _build().items() if key != "archs") or "unknown",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "triton": _version("triton"),
        "host module": _host(),
    }
    found |= {f"gpu {i}": _gpu(i) for i in range(torch.cuda.device_count())} or {"gpu": "none visible"}
    if _dispatch._force:
        found["forced"] = f"{_dispatch._force} (N3_BACKEND)"
    return found


def _build() -> dict[str, str]:
    path = HERE / "_build.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _host() -> str:
    try:
        from . import _host as host
    except ImportError:
        built = ", ".join(sorted(path.name for path in HERE.glob("_host*"))) or "not built"
        return f"not for this Python ({built}); only tests and tools use it"
    return f"CPU kernels use {host.cpu_isa()}"


def _gpu(index: int) -> str:
    p = torch.cuda.get_device_properties(index)
    return f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"


# ---------------------------------------------------------------- backends


def standing(op: _dispatch.Op, backend: str, device: str, arch: str) -> tuple[str, str | None]:
    """How ``backend`` stands to ``op`` on ``device``, in a word or two, and the reason where it does not serve it.

    >>> standing(_dispatch.OPS["gated_rms_norm"], "cuda", "cpu", "cpu")
    ('-', 'takes cuda tensors, got cpu')
    """
    reason = _dispatch.why_not(op, backend, device, arch)
    if reason:
        return "-", reason
    if op.composite:
        return "composite", None
    reason = _dispatch.unproven(op, backend, arch)
    if reason:
        return "opt-in", reason
    first = (_dispatch._force or _dispatch.backends_of(op, device, arch)[0]) == backend
    word = "default" if first else "available"
    on_record = backend in _dispatch.proven().get(arch, {}).get(op.name, {})
    if device == "cuda" and backend != "reference":
        word += ", proven" if on_record else ", unproven"
    return word, None


def _print_backends(out: Console, device: str, arch: str) -> None:
    where = f"{device} ({arch})" if arch != device else device
    out.print(f"\nWhich backend serves {where} tensors:")
    table = Table(box=SIMPLE)
    reasons: dict[str, list[str]] = {}
    table.add_column("operator", no_wrap=True)
    for backend in BACKENDS:
        table.add_column(backend)
    for name, op in sorted(_dispatch.OPS.items()):
        words = []
        for backend in BACKENDS:
            word, reason = standing(op, backend, device, arch)
            words.append(word)
            if reason and not op.composite:
                reasons.setdefault(f"{backend}: {reason}", []).append(name)
        table.add_row(name, *words)
    out.print(table)
    for reason, names in reasons.items():
        out.print(f"  {reason} [{len(names)} of {len(_dispatch.OPS)}]", markup=False)


def _print_proven(out: Console) -> None:
    revision = _build().get("revision", "unknown")
    for arch, ops in sorted(_dispatch.proven().items()):
        records = [record for backends in ops.values() for record in backends.values()]
        for commit in sorted({record["commit"] for record in records}):
            of = [record for record in records if record["commit"] == commit]
            then = "" if commit == revision else f"; this build is {revision}, its sources may have changed since"
            out.print(f"proven on {arch}: {len(of)} kernels, {of[0]['device']}, {of[0]['date']}, commit {commit}{then}")


# ---------------------------------------------------------------- the quick check


def check(op: _dispatch.Op, device: str, arch: str) -> dict[str, Deviation | str]:
    """The sample call of ``op`` on every backend that takes it: its deviation, or the message of what it raised."""
    found: dict[str, Deviation | str] = {}
    for backend in BACKENDS:
        args, kwargs = sample(op.name, device)
        if _dispatch.why_not(op, backend, device, arch, args, kwargs):
            continue
        found[backend] = deviation = Deviation()
        try:
            with nullcontext() if op.composite else use_backend(backend):
                compare(op, args, kwargs, deviation)
        except Exception as error:  # whatever it is, it is what the report is for
            found[backend] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def is_right(found: Deviation | str) -> bool:
    return isinstance(found, Deviation) and found.relative <= TOLERANCE and not found.differ


def describe(d: Deviation) -> tuple[str, str, str]:
    """Largest error, the same relative to the largest value, and integers that differ, as cells of a table."""
    integers = f"{d.differ} of {d.integers}" if d.integers else "-"
    if d.error is None:
        return "-", "-", integers
    return f"{d.error:.1e}" if d.error else "0", f"{d.relative:.1e}" if d.error else "0", integers


def _print_check(out: Console, device: str, arch: str) -> bool:
    out.print(f"\nA small call of every operator on {device}, against its definition in float64:")
    table = Table(box=SIMPLE)
    for name in ("operator", "backend", *MEASURES, ""):
        table.add_column(name, justify="right" if name in MEASURES else "left", no_wrap=name == "operator")
    right = True
    for name, op in sorted(_dispatch.OPS.items()):
        for backend, found in check(op, device, arch).items():
            right &= is_right(found)
            cells = describe(found) if isinstance(found, Deviation) else ("", "", "")
            verdict = "ok" if is_right(found) else "WRONG" if isinstance(found, Deviation) else found
            table.add_row(name, backend, *cells, verdict, style=None if is_right(found) else "bold red")
    out.print(table)
    return right


def report(out: Console) -> int:
    """Prints everything; returns 1 if an operator is wrong here, otherwise 0."""
    for name, value in facts().items():
        out.print(f"{name:<12} {value}", markup=False)
    places = [("cpu", "cpu")]
    if torch.cuda.is_available():
        torch.cuda.init()
        places.append(("cuda", _dispatch._cuda_arch()))
    for device, arch in places:
        _print_backends(out, device, arch)
    _print_proven(out)
    right = all([_print_check(out, device, arch) for device, arch in places])
    verdict = "Every operator agrees with its definition here." if right else "AN OPERATOR IS WRONG HERE: see above."
    out.print(verdict, style="bold green" if right else "bold red")
    return 0 if right else 1


# ---------------------------------------------------------------- doctor --prove


def _tests() -> Path:
    return HERE.parent / "tests"


def why_not_prove() -> str | None:
    """The reason why the tests cannot prove anything here, or None."""
    if not torch.cuda.is_available():
        return "needs a CUDA GPU, and none is visible"
    if not (_tests() / "conftest.py").is_file():
        return "needs a source checkout: the tests are not part of an installed package"
    missing = [name for name in ("pytest", "hypothesis") if _version(name) == "not installed"]
    return f"needs {' and '.join(missing)}: pip install 'n3kernels[test]'" if missing else None


def prove() -> int:
    """Runs the tests on this GPU, which write what passed to the user's record; returns pytest's exit code."""
    record = _dispatch.user_record()
    command = [sys.executable, "-m", "pytest", str(_tests()), "-m", "not slow", "--prove", f"--prove-to={record}"]
    code = subprocess.call(command, cwd=HERE.parent)
    print(f"the record of what passed: {record}")
    return code
