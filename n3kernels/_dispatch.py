"""Which backend runs an operator.

The backend that runs is the first of ``cuda``, ``triton``, ``reference`` (for CPU tensors ``cpu``, ``reference``) that
is *built*, *proven on this architecture* and *takes the call*.

* Built: the library holds machine code for the device. For Triton: the package is importable.
* Proven: ``proven.json`` in this package, written by ``pytest --prove``, or the user's own record in the cache
  directory, written by ``n3kernels doctor --prove``, says that every test of the operator passed on that architecture.
  The reference needs no proof, and for ``cpu`` continuous integration is the proof. A Triton kernel, whose numbers the
  interpreter checks, may serve an architecture where it was not run yet, with one warning. A CUDA kernel may not.
* Takes the call: a predicate over dtypes, sizes and options, never over values, that returns the reason if not.

The answer is written into PyTorch's dispatcher: a C++ kernel stays bare under its key where it is the default and
covers its schema, otherwise a Python kernel is laid over it. ``use_backend`` and ``N3_BACKEND`` lay the forced backend
over both keys. For CUDA the choice is made when torch creates its context, because asking a GPU for its architecture
creates one, and a process that has a context cannot fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ._autograd import autograd_kernel
from ._checks import Check

__all__ = ["BACKENDS", "Explanation", "OPS", "backends_of", "batch_invariant", "explain", "register", "use_backend"]

BACKENDS = ("reference", "cpu", "triton", "cuda")
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}  # device -> backends, best first
_CPP = {"cpu": "CPU", "cuda": "CUDA"}  # C++ backend -> dispatch key
_HERE = Path(__file__).parent

_lib = torch.library.Library("n3", "FRAGMENT")


@dataclass
class Op:
    """One operator and what implements it."""

    name: str  # with its overload, as torch.ops.n3 knows it: "ssd_scan", "ssd_scan.slots"
    check: Callable[..., None]
    reference: Callable[..., Any]
    triton: str | None = None  # "module:function", imported at its first use
    supports: dict[str, Callable[..., str | None]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # backend -> why it is not there, for doctor and tests
    composite: bool = False  # decomposes into other operators of n3; has no kernel of its own
    kernels: dict[str, Any] = field(default_factory=dict)  # C++ backend -> the kernel under our Python overlay

    @property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.reference)

    @property
    def overload(self) -> torch._ops.OpOverload:
        name, _, overload = self.name.partition(".")
        return getattr(getattr(torch.ops.n3, name), overload or "default")


OPS: dict[str, Op] = {}
_arch = {"cpu": "cpu"}  # device -> architecture; "cuda" joins when torch creates its context
_force: str | None = None
_laid: dict[tuple[str, str], torch.library.Library] = {}
_warned = False
_library: ctypes.CDLL | None = None
_batch_invariant = os.environ.get("N3_BATCH_INVARIANT", "0") == "1"


# ---------------------------------------------------------------- registration


def register(
    name: str,
    *,
    check: Callable[..., None],
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    triton: str | None = None,
    supports: dict[str, Callable[..., str | None]] | None = None,
    missing: dict[str, str] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Gives the operator ``n3::name`` its check, reference, fake kernel, Triton entry and autograd formula.

    ``check`` takes the operator's arguments and raises the messages of its C++ header; it runs before the reference,
    the Triton entry and the fake kernel, so neither of them checks again. Without ``fake`` the operator is a
    composite: its reference calls other operators and is what autograd and ``torch.compile`` see.
    """
    op = OPS[name] = Op(name, check, reference, triton, supports or {}, missing or {}, composite=fake is None)
    op.check = _with_written(op, check)
    for backend, key in _CPP.items():
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"n3::{name}", key):
            op.kernels[backend] = torch.library.get_kernel(f"n3::{name}", key)
    if op.composite:
        _lib.impl(name, partial(_define, op), "CompositeImplicitAutograd")
        return
    _lib.impl(name, partial(_define, op), "CompositeExplicitAutograd")
    torch.library.register_fake(f"n3::{name}", _checked(op, fake), lib=_lib)
    if backward is not None or name.endswith("_bwd"):  # in Python: decoding is not to pay for it
        kernel = autograd_kernel(op.overload, op.signature, setup_context, backward)
        _lib.impl(name, kernel, "Autograd", with_keyset=True)


def _with_written(op: Op, check: Callable[..., None]) -> Callable[..., None]:
    """``check``, and that what is written in place has memory for each element. The C++ twin is common/written.h."""
    arguments = op.overload._schema.arguments
    written = [(i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    if not written:
        return check

    @wraps(check)
    def call(*args, **kwargs):
        check(*args, **kwargs)
        for i, name in written:
            value = args[i] if i < len(args) else kwargs.get(name)
            for d in range(0 if value is None else value.dim()):
                if value.stride(d) == 0 and value.shape[d] > 1:
                    words = f"{name} must not be expanded, as it is written in place, got stride 0 along dimension {d}"
                    Check(op.name.split(".")[0]).fail(f"{words} of size {value.shape[d]}")

    return call


def _checked(op: Op, fn: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args, **kwargs):
        op.check(*args, **kwargs)
        return fn(*args, **kwargs)

    return call


def _define(op: Op, *args, **kwargs) -> Any:
    """The reference, checked. Autocast is still on below the dispatcher: it would make a definition's matrix products
    in bfloat16, but for those of a composite, which are the user's as if written out."""
    op.check(*args, **kwargs)
    if op.composite or not torch.is_autocast_enabled(device := args[0].device.type):
        return op.reference(*args, **kwargs)
    with torch.autocast(device, enabled=False):
        return op.reference(*args, **kwargs)


# ---------------------------------------------------------------- what runs where


@cache
def proven() -> dict[str, dict[str, dict[str, Any]]]:
    """{architecture: {operator: {backend: record}}}: the repository's record and the user's own."""
    record: dict[str, dict[str, dict[str, Any]]] = {}
    for path in (_HERE / "proven.json", user_record()):
        if path.is_file():
            for arch, ops in json.loads(path.read_text()).items():
                for name, backends in ops.items():
                    record.setdefault(arch, {}).setdefault(name, {}).update(backends)
    return record


def user_record() -> Path:
    """Where ``n3kernels doctor --prove`` keeps what ran on the user's own GPU."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "n3kernels" / "proven.json"


@cache
def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def build_archs() -> tuple[str, ...]:
    """Architectures the library holds SASS for, as ``sm_90``."""
    facts = _HERE / "_build.json"
    archs = json.loads(facts.read_text())["archs"].split() if facts.is_file() else []
    return tuple("sm_" + arch.rstrip("af") for arch in archs)


def why_not(op: Op, backend: str, device: str, arch: str, args: tuple = (), kwargs: dict | None = None) -> str | None:
    """None if ``backend`` can run this call, else the reason, in the words of ``explain`` and of the errors."""
    if op.composite:
        return None if backend == "reference" else "decomposes into other operators of n3"
    if backend == "triton":
        if op.triton is None:
            return "not built: " + op.missing.get("triton", "no Triton version")
        if not _has_triton():
            return "triton is not installed"
        if device == "cpu" and not _interpreting():
            return "takes cuda tensors, got cpu (TRITON_INTERPRET=1 runs it on the CPU, for tests)"
    elif backend in _CPP:
        if backend != device:
            return f"takes {backend} tensors, got {device}"
        if backend not in op.kernels:
            return "not built: " + op.missing.get(backend, "this installation has no such kernel")
        if backend == "cuda" and arch not in build_archs():
            return f"not built for {arch}, only for {', '.join(build_archs()) or 'the CPU'}"
    predicate = op.supports.get(backend)
    return predicate(*args, **(kwargs or {})) if predicate and (args or kwargs) else None


def unproven(op: Op, backend: str, arch: str) -> str | None:
    """The reason why ``backend`` is not to be the default on ``arch``; force is not hindered by it."""
    if backend == "cuda" and "cuda" not in proven().get(arch, {}).get(op.name, {}):
        return f"not proven on {arch}: its tests have not run there yet"
    return None


def backends_of(op: Op, device: str, arch: str, args: tuple = (), kwargs: dict | None = None) -> list[str]:
    """The backends that may serve ``op`` by default, best first."""
    if op.composite:
        return ["reference"]
    return [b for b in ORDER[device] if not why_not(op, b, device, arch, args, kwargs) and not unproven(op, b, arch)]


def serving(name: str, *args: Any, **kwargs: Any) -> str | None:
    """The backend that runs this call; None where it would raise. The short form of `explain`."""
    op, device = OPS[name], args[0].device.type
    able = [_force] if _force and not op.composite else backends_of(op, device, _arch[device], args, kwargs)
    return next((b for b in able if not why_not(op, b, device, _arch[device], args, kwargs)), None)


@dataclass
class Explanation:
    """The answer of `explain`: the backend that runs, and for every other one why it does not."""

    op: str
    device: str
    arch: str
    backend: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        lines = [f"n3::{self.op} on {self.device} ({self.arch}): {self.backend or 'raises'}"]
        return "\n".join(lines + [f"  {name:<10}{reason}" for name, reason in self.reasons.items()])


def explain(op: str | torch._ops.OpOverload, *args: Any, device: str | None = None, **kwargs: Any) -> Explanation:
    """Tells which backend would run ``op`` on these arguments, and why not the others.

    Args:
        op: an operator's name (``"nvfp4_linear"``, ``"ssd_scan.slots"``) or overload (``torch.ops.n3.sample.default``).
        args, kwargs: a call's arguments. Without any, the answer holds for the operator in general.
        device: ``"cpu"`` or ``"cuda"``; taken from the arguments where there are any, otherwise ``"cpu"``.
    Returns:
        `Explanation`: ``backend``, ``reasons``; prints as a short table.
    Raises:
        KeyError: there is no such operator.

    >>> explain("gated_rms_norm").device
    'cpu'
    """
    name = op if isinstance(op, str) else op._schema.name.split("::")[1]
    if not isinstance(op, str) and op._overloadname not in ("", "default"):
        name += "." + op._overloadname
    entry = OPS[name]
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
    device = device or (tensors[0].device.type if tensors else "cpu")
    arch = _arch.get(device) or (_cuda_arch() if device == "cuda" and torch.cuda.is_available() else device)
    reasons = {}
    able = [_force] if _force and not entry.composite else backends_of(entry, device, arch, args, kwargs)
    chosen = next((b for b in able if not why_not(entry, b, device, arch, args, kwargs)), None)
    for backend in BACKENDS:
        if backend == chosen:
            continue
        reason = why_not(entry, backend, device, arch, args, kwargs) or unproven(entry, backend, arch)
        if not reason:
            reason = f"{_force} is forced" if _force else f"{chosen} is preferred"
        reasons[backend] = reason
    return Explanation(name, device, arch, chosen, reasons)


# ---------------------------------------------------------------- the dispatcher's side


def _call(op: Op, backend: str, device: str, args: tuple, kwargs: dict) -> Any:
    if backend == "reference":
        return _define(op, *args, **kwargs)
    if backend == "triton":
        op.check(*args, **kwargs)
        return _triton(op.triton)(*args, **kwargs)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _CPP[backend]))
    return op.kernels[backend].call_boxed(keys, *args, **kwargs)


@cache
def _triton(entry: str) -> Callable[..., Any]:
    module, function = entry.split(":")
    return getattr(import_module(module), function)


def _forced(op: Op, backend: str, device: str, *args, **kwargs):
    reason = why_not(op, backend, device, _arch[device], args, kwargs)
    if reason:
        raise NotImplementedError(f"n3::{op.name}: backend {backend!r} is forced but does not take this call: {reason}")
    return _call(op, backend, device, args, kwargs)


def _first_that_can(op: Op, order: list[str], device: str, *args, **kwargs):
    for backend in order:
        predicate = op.supports.get(backend)
        if not predicate or predicate(*args, **kwargs) is None:
            return _call(op, backend, device, args, kwargs)
    raise NotImplementedError(f"n3::{op.name}: no backend takes this call")  # the reference has no predicate


def _warn_once(op: Op, arch: str) -> None:
    global _warned
    if not _warned and "triton" not in proven().get(arch, {}).get(op.name, {}):
        _warned = True
        warnings.warn(
            f"n3kernels: the Triton kernels have not been proven on {arch} yet; their numbers were checked in the "
            "interpreter. `n3kernels doctor --prove` runs the tests here and keeps the record.",
            stacklevel=3,
        )


def _over(op: Op, device: str) -> Callable[..., Any] | None:
    """What lies over the C++ kernel of this device; None: what the dispatcher finds by itself is right."""
    if op.composite:
        return None
    if _force:
        return partial(_forced, op, _force, device)
    order = backends_of(op, device, _arch[device])
    if order[0] == "triton":
        _warn_once(op, _arch[device])
    if order[0] in op.supports:
        return partial(_first_that_can, op, order, device)
    if order[0] == device:
        return None
    if order[0] == "reference" and device not in op.kernels:
        return None  # the reference lies under CompositeExplicitAutograd already
    return partial(_first_that_can, op, order, device)


def refresh() -> None:
    """Makes the dispatcher agree with the forced backend and the architectures. Not to be called in a kernel."""
    for op in OPS.values():
        for device in _arch:
            if old := _laid.pop((op.name, device), None):
                old._destroy()  # bares the C++ kernel again
            fn = _over(op, device)
            if fn is None:
                continue
            _laid[op.name, device] = lib = torch.library.Library("n3", "FRAGMENT")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch before 2.14 warns that a kernel is overridden, as is meant
                lib.impl(op.name, fn, device.upper(), allow_override=True)


@contextlib.contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Forces one backend for every operator in a ``with`` block; ``None`` restores the default.

    It holds for the whole process, and a CUDA graph keeps what was forced at its capture. A call that the forced
    backend does not take raises `NotImplementedError` with the reason; being unproven is no hindrance.

    Args:
        backend: ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"`` or ``None``.
    Raises:
        ValueError: an unknown backend.

    >>> with use_backend("reference"):
    ...     explain("gated_rms_norm").backend
    'reference'
    """
    global _force
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"use_backend: backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    before, _force = _force, backend
    refresh()
    try:
        yield
    finally:
        _force = before
        refresh()


@contextlib.contextmanager
def batch_invariant(enabled: bool = True) -> Iterator[None]:
    """In a ``with`` block, a row's bits do not depend on what else is in the batch, for every operator.

    Routing, scan, convolution, decode, verification and every CPU kernel are so always; operators that choose their
    kernel by the number of tokens (large GEMMs on GPUs) fix one order of summation. ``N3_BATCH_INVARIANT=1`` does the
    same for the process.
    """
    before = _batch_invariant
    _set_batch_invariant(enabled)
    try:
        yield
    finally:
        _set_batch_invariant(before)


def _set_batch_invariant(enabled: bool) -> None:
    global _batch_invariant
    _batch_invariant = enabled
    # Read by the plans of the CUDA kernels; a library for the CPU alone has no such switch, its kernels are always so.
    switch = getattr(_library, "n3_set_batch_invariant", None)
    if switch is not None:
        switch(ctypes.c_bool(enabled))


def _cuda_arch() -> str:
    """Architecture of the visible GPUs, as ``sm_90``; where they differ, the lowest."""
    return "sm_" + min(
        ("{}{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())), key=int
    )


def _cuda_is_up() -> None:
    _arch["cuda"] = _cuda_arch()
    refresh()


def _is_command_line() -> bool:
    """``n3kernels ...`` or ``python -m n3kernels ...``, where wrong input ends with one line: this package is imported
    before the command line's own code could say it."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1 :][:1] if "-m" in words else []
    return module == ["n3kernels"] or Path(sys.argv[0]).name == "n3kernels"


def start(library: Path) -> None:
    """Called once, after every family has registered: applies N3_BACKEND and waits for CUDA."""
    global _force, _library
    _library = ctypes.CDLL(str(library))  # loaded already: this is a second handle to it
    forced = os.environ.get("N3_BACKEND") or None
    if forced is not None and forced not in BACKENDS:
        message = f"N3_BACKEND must be one of {', '.join(BACKENDS)}, got {forced!r}"
        if _is_command_line():
            print(f"n3kernels: {message}", file=sys.stderr)
            sys.exit(2)
        raise ValueError(message)
    _force = forced
    refresh()
    torch.cuda._lazy_call(_cuda_is_up)
