"""The choice of a backend, on every architecture, without a GPU; and what is laid over PyTorch's dispatcher."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import DEVICE

import n3kernels
from n3kernels import _dispatch
from n3kernels._dispatch import BACKENDS, OPS, backends_of, explain, unproven, use_backend, why_not
from n3kernels._samples import sample

EVERY_OP = sorted(OPS)
PLAIN = sorted(name for name, op in OPS.items() if not op.composite)
CPU_OP = next((name for name in PLAIN if "cpu" in OPS[name].kernels), None)
SMALL = (torch.ones(1, 16), None, torch.ones(16), 16)  # a call of gated_rms_norm


@pytest.fixture
def world(monkeypatch):
    """``world(archs, proven)``: the library is built for ``archs``, with a CUDA kernel for every operator."""
    monkeypatch.setattr(_dispatch, "_force", None)
    monkeypatch.setattr(_dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(_dispatch, "_interpreting", lambda: False)

    def make(archs=(), proven=None, kernels=True):
        monkeypatch.setattr(_dispatch, "build_archs", lambda: tuple(archs))
        monkeypatch.setattr(_dispatch, "proven", lambda: proven or {})
        for op in OPS.values():
            keep = {k: v for k, v in op.kernels.items() if k != "cuda"}
            monkeypatch.setattr(op, "kernels", {**keep, "cuda": object()} if kernels and not op.composite else keep)

    make()
    return make


def record(arch, *names, backend="cuda"):
    return {arch: {name: {backend: {"passed": 1}} for name in names}}


# ---------------------------------------------------------------- which backend, and why not the others


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_a_cuda_kernel_is_the_default_only_where_it_is_built_and_proven(world, name, arch):
    op = OPS[name]
    others = ["triton", "reference"] if op.triton else ["reference"]
    world(archs=["sm_90"])
    assert backends_of(op, "cuda", arch) == others
    built = None if arch == "sm_90" else f"not built for {arch}, only for sm_90"
    assert why_not(op, "cuda", "cuda", arch) == built
    assert unproven(op, "cuda", arch) == f"not proven on {arch}: its tests have not run there yet"

    world(archs=[arch], proven=record("sm_70", name))  # proven elsewhere
    assert backends_of(op, "cuda", arch) == others
    world(archs=[arch], proven=record(arch, name, backend="triton"))
    assert backends_of(op, "cuda", arch) == others
    world(archs=["sm_70"], proven=record(arch, name))  # proven, but this library has no code for it
    assert backends_of(op, "cuda", arch) == others
    world(archs=[arch], proven=record(arch, name))
    assert backends_of(op, "cuda", arch) == ["cuda", *others]


@pytest.mark.parametrize("name", PLAIN)
def test_cpu_tensors(world, name):
    op = OPS[name]
    world(archs=["sm_90"], proven=record("sm_90", *PLAIN))
    assert backends_of(op, "cpu", "cpu") == [b for b in ("cpu", "reference") if b in ("reference", *op.kernels)]
    assert why_not(op, "cuda", "cpu", "cpu") == "takes cuda tensors, got cpu"
    assert why_not(op, "reference", "cpu", "cpu") is None
    if op.triton:
        assert why_not(op, "triton", "cpu", "cpu").startswith("takes cuda tensors, got cpu (TRITON_INTERPRET=1")


@pytest.mark.parametrize("name", PLAIN)
def test_a_backend_that_is_missing_says_why(world, name):
    op = OPS[name]
    world(kernels=False)
    assert why_not(op, "cuda", "cuda", "sm_90").startswith("not built: ")
    assert why_not(op, "cpu", "cuda", "sm_90") == "takes cpu tensors, got cuda"
    if not op.triton:
        assert why_not(op, "triton", "cuda", "sm_90") == f"not built: {op.missing['triton']}"


def test_triton_may_be_absent(world, monkeypatch):
    monkeypatch.setattr(_dispatch, "_has_triton", lambda: False)
    op = next(op for op in OPS.values() if op.triton)
    assert why_not(op, "triton", "cuda", "sm_90") == "triton is not installed"
    assert backends_of(op, "cuda", "sm_90") == ["reference"]


@pytest.mark.parametrize("name", [name for name in EVERY_OP if OPS[name].composite])
def test_a_composite_has_no_kernel(name):
    op = OPS[name]
    assert backends_of(op, "cuda", "sm_90") == ["reference"]
    for backend in ("cpu", "triton", "cuda"):
        assert why_not(op, backend, "cuda", "sm_90") == "decomposes into other operators of n3"


@pytest.mark.parametrize("name", EVERY_OP)
@pytest.mark.parametrize("arch", ["cpu", "sm_90"])
def test_explain_agrees_with_the_choice(world, monkeypatch, name, arch):
    """One backend, and a reason for each of the others."""
    device = "cpu" if arch == "cpu" else "cuda"
    world(archs=["sm_90"], proven=record("sm_90", *EVERY_OP[::2]))
    monkeypatch.setitem(_dispatch._arch, device, arch)
    said = explain(name, device=device)
    assert (said.op, said.device, said.arch) == (name, device, arch)
    assert said.backend == backends_of(OPS[name], device, arch)[0]
    assert set(said.reasons) == set(BACKENDS) - {said.backend} and all(said.reasons.values())
    first, *rest = str(said).splitlines()
    assert first == f"n3::{name} on {device} ({arch}): {said.backend}" and len(rest) == 3


@pytest.mark.parametrize("name", EVERY_OP)
def test_explain_takes_a_call(name):
    args, kwargs = sample(name, DEVICE)
    said = explain(OPS[name].overload, *args, **kwargs)
    assert said.op == name and said.device == DEVICE and said.backend in BACKENDS
    assert explain(name, *args, **kwargs) == said


def test_explain_knows_the_force():
    with use_backend("cuda"):
        said = explain("gated_rms_norm", device="cpu")
        assert said.backend is None and said.reasons["cuda"] == "takes cuda tensors, got cpu"
        assert said.reasons["reference"] == "cuda is forced"
        assert str(said).startswith("n3::gated_rms_norm on cpu (cpu): raises\n")


def test_explain_of_no_operator():
    with pytest.raises(KeyError):
        explain("gated_rms_form")


def test_a_predicate_is_asked_for_a_call_only(world, monkeypatch):
    def narrow(x, *args, **kwargs):
        return f"x must have 3 dimensions, got {x.dim()}" if x.dim() != 3 else None

    op = OPS["gated_rms_norm"]
    world(archs=["sm_90"], proven=record("sm_90", "gated_rms_norm"))
    monkeypatch.setattr(op, "supports", {"cuda": narrow})
    assert backends_of(op, "cuda", "sm_90")[0] == "cuda"
    assert backends_of(op, "cuda", "sm_90", SMALL)[0] != "cuda"
    assert why_not(op, "cuda", "cuda", "sm_90", SMALL) == "x must have 3 dimensions, got 2"


# ---------------------------------------------------------------- what lies over the dispatcher


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_laid_over_cuda(world, monkeypatch, name):
    op = OPS[name]
    monkeypatch.setattr(op, "supports", {})
    monkeypatch.setitem(_dispatch._arch, "cuda", "sm_90")
    monkeypatch.setattr(_dispatch, "_warned", True)
    world(archs=["sm_90"], proven=record("sm_90", name))
    assert _dispatch._over(op, "cuda") is None  # the C++ kernel stays bare
    world(archs=["sm_90"])
    laid = _dispatch._over(op, "cuda")  # unproven: covered, even where nothing but the reference is left
    assert laid.func is _dispatch._first_that_can and "cuda" not in laid.args[1]
    world(archs=["sm_90"], kernels=False)
    assert (_dispatch._over(op, "cuda") is None) == (op.triton is None)  # the reference is there already


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.triton])
def test_an_unproven_triton_kernel_warns_once(world, monkeypatch, name):
    op = OPS[name]
    monkeypatch.setitem(_dispatch._arch, "cuda", "sm_120")
    monkeypatch.setattr(_dispatch, "_warned", False)
    world()
    with pytest.warns(UserWarning, match="Triton kernels have not been proven on sm_120"):
        _dispatch._over(op, "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _dispatch._over(op, "cuda")
    monkeypatch.setattr(_dispatch, "_warned", False)
    world(proven=record("sm_120", op.name, backend="triton"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _dispatch._over(op, "cuda")


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of the reference of gated_rms_norm."""
    op, seen = OPS["gated_rms_norm"], []
    reference = op.reference

    def counted(*args, **kwargs):
        seen.append(args)
        return reference(*args, **kwargs)

    monkeypatch.setattr(op, "reference", counted)
    return seen


def test_use_backend_nests_and_restores(calls):
    before = _dispatch._force
    with use_backend("reference"):
        torch.ops.n3.gated_rms_norm(*SMALL)
        assert len(calls) == 1 and explain("gated_rms_norm").backend == "reference"
        with use_backend("cuda"):
            with pytest.raises(NotImplementedError):
                torch.ops.n3.gated_rms_norm(*SMALL)
            with use_backend(None):
                torch.ops.n3.gated_rms_norm(*SMALL)
                assert _dispatch._force is None
            assert _dispatch._force == "cuda"
        torch.ops.n3.gated_rms_norm(*SMALL)
        assert _dispatch._force == "reference"
    assert _dispatch._force == before and len(calls) >= 2


def test_use_backend_restores_after_an_error():
    before = _dispatch._force
    with pytest.raises(ZeroDivisionError), use_backend("reference"):
        _ = 1 / 0
    assert _dispatch._force == before


@pytest.mark.parametrize("name", PLAIN)
def test_a_forced_backend_that_cannot_says_why(name):
    args, kwargs = sample(name)
    with use_backend("cuda"), pytest.raises(NotImplementedError) as error:
        OPS[name].overload(*args, **kwargs)
    said = "backend 'cuda' is forced but does not take this call: takes cuda tensors, got cpu"
    assert str(error.value) == f"n3::{name}: {said}"


@pytest.mark.parametrize("unknown", ["", "Reference", "tpu", 3])
def test_an_unknown_backend(unknown):
    before = _dispatch._force
    with pytest.raises(ValueError) as error, use_backend(unknown):
        pass
    want = "use_backend: backend must be one of reference, cpu, triton, cuda or None"
    assert str(error.value) == f"{want}, got {unknown!r}" and _dispatch._force == before


@pytest.mark.parametrize("name", EVERY_OP)
def test_every_backend_that_takes_a_call_runs_it(name):
    op, arch = OPS[name], "cpu" if DEVICE == "cpu" else _dispatch._cuda_arch()
    for backend in BACKENDS:
        args, kwargs = sample(name, DEVICE)
        if op.composite or why_not(op, backend, DEVICE, arch, args, kwargs):
            continue
        with use_backend(backend):
            assert explain(name, *args, **kwargs).backend == backend
            op.overload(*args, **kwargs)


def test_compiled_code_takes_the_forced_backend(calls):
    compiled = torch.compile(torch.ops.n3.gated_rms_norm, fullgraph=True, backend="aot_eager")
    args = tuple(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in SMALL)
    with use_backend("reference"):
        compiled(*args)
        assert len(calls) >= 1
    with use_backend("cpu" if DEVICE == "cuda" else "cuda"), pytest.raises(NotImplementedError):
        compiled(*args)  # the same graph: the force acts when it runs
    calls.clear()
    with use_backend("reference"):
        compiled(*args)
    assert len(calls) == 1


@pytest.mark.skipif(CPU_OP is None, reason="no operator has a CPU kernel yet")
def test_the_default_is_bare(monkeypatch):
    """No Python runs over a C++ kernel that is the default and covers its schema."""
    op = next(op for op in OPS.values() if "cpu" in op.kernels and not op.supports)

    def never(*args, **kwargs):
        raise AssertionError("the call went through Python")

    monkeypatch.setattr(_dispatch, "_call", never)
    args, kwargs = sample(op.name)
    with use_backend(None):
        op.overload(*args, **kwargs)
    assert (op.name, "cpu") not in _dispatch._laid or _dispatch._force


# ---------------------------------------------------------------- the environment


def in_a_process(code, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("N3_")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**env, **environment}, capture_output=True, text=True)


FORCED = """
import torch, n3kernels
from n3kernels import _dispatch
print(n3kernels.explain("gated_rms_norm").backend, _dispatch._batch_invariant)
try:
    torch.ops.n3.gated_rms_norm(torch.ones(1, 8), None, torch.ones(8), 8)
except NotImplementedError as error:
    print(error)
with n3kernels.use_backend(None):
    print(torch.ops.n3.gated_rms_norm(torch.ones(1, 8), None, torch.ones(8), 8).shape)
"""


def test_n3_backend_forces_the_process():
    run = in_a_process(FORCED, N3_BACKEND="cuda", N3_BATCH_INVARIANT="1", CUDA_VISIBLE_DEVICES="")
    said = "backend 'cuda' is forced but does not take this call: takes cuda tensors, got cpu"
    assert run.stdout.splitlines() == ["None True", f"n3::gated_rms_norm: {said}", "torch.Size([1, 8])"], run.stderr


def test_n3_backend_must_be_known():
    run = in_a_process("import n3kernels", N3_BACKEND="gpu")
    want = "ValueError: N3_BACKEND must be one of reference, cpu, triton, cuda, got 'gpu'"
    assert run.returncode == 1 and run.stderr.splitlines()[-1] == want


@pytest.mark.parametrize("arguments", [["-m", "n3kernels", "doctor"], ["-I", "-m", "n3kernels", "--version"]])
def test_n3_backend_unknown_on_the_command_line(arguments):
    """One line and exit code 2, as for every wrong input there."""
    run = subprocess.run([sys.executable, *arguments], env={**os.environ, "N3_BACKEND": "gpu"}, capture_output=True)
    want = b"n3kernels: N3_BACKEND must be one of reference, cpu, triton, cuda, got 'gpu'\n"
    assert (run.returncode, run.stdout, run.stderr) == (2, b"", want)


def test_batch_invariant_nests_and_restores():
    before = _dispatch._batch_invariant
    with n3kernels.batch_invariant():
        assert _dispatch._batch_invariant
        with n3kernels.batch_invariant(False):
            assert not _dispatch._batch_invariant
        assert _dispatch._batch_invariant
    assert _dispatch._batch_invariant == before


def test_the_user_record_lies_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = _dispatch.user_record()
    assert path == tmp_path / "n3kernels" / "proven.json"
    path.parent.mkdir()
    path.write_text('{"sm_90": {"sample": {"cuda": {"passed": 3}}}}')
    _dispatch.proven.cache_clear()
    try:
        assert _dispatch.proven()["sm_90"]["sample"]["cuda"] == {"passed": 3}
        assert unproven(OPS["sample"], "cuda", "sm_90") is None
    finally:
        monkeypatch.undo()
        _dispatch.proven.cache_clear()
