"""One library for every torch and every Python: the ``_C.so`` of this working tree, and the wheel that `make wheel`
builds, loaded in other versions of both, give the same answers.

Each version of N3_ABI_TORCH (default: the floor, 2.11.0, and 2.14.1) gets a virtual environment under build/abi, which
is kept, of another Python where there is one. Where pip cannot install one, because there is no network, the tests are
skipped and say so. N3_ABI_WHEEL names a wheel that was built before, e.g. with CUDA, to be judged instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from conftest import assert_same_bits

import n3kernels
from n3kernels._samples import SAMPLES, sample

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = os.environ.get("N3_ABI_TORCH", "2.11.0 2.14.1").split()
PYTHONS = {"2.11.0": "python3.10", "2.14.1": "python3.13"}

pytestmark = pytest.mark.slow


def other_python(version: str) -> str:
    """Another Python for this torch, from the PATH or from pyenv; this one where the machine has none."""
    name = PYTHONS.get(version, "")
    installed = Path.home().glob(f".pyenv/versions/{name.removeprefix('python')}.*/bin/{name}") if name else []
    for python in (name, *map(str, installed)):
        try:
            subprocess.run([python, "-c", "import venv, ensurepip"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return python
    return sys.executable


def interpreter(version: str) -> Path:
    """A Python with torch ``version`` and nothing of this environment."""
    folder = ROOT / "build" / "abi" / version
    python = folder / "bin" / "python"
    ready, needed = folder / ".ready", [f"torch=={version}", "numpy", "safetensors", "typer", "rich"]
    if not ready.is_file() or ready.read_text() != " ".join(needed):
        subprocess.run([other_python(version), "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "install", "-q", "--no-compile", *needed]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            pytest.skip(f"torch {version} cannot be installed here: {reason}")
        ready.write_text(" ".join(needed))
    return python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this tree, for the CPU; or the one that was built before."""
    if made := os.environ.get("N3_ABI_WHEEL"):
        return Path(made).resolve()
    pytest.importorskip("auditwheel", reason="auditwheel, which makes the wheel portable, is not installed")
    folder = tmp_path_factory.mktemp("wheel")
    script = ROOT / "scripts" / "build_wheel.py"
    env = {**os.environ, "N3_CUDA": "OFF"}
    subprocess.run([sys.executable, script, folder], check=True, env=env)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module", params=[(v, form) for v in VERSIONS for form in ("tree", "wheel")], ids="-".join)
def other(request, tmp_path_factory):
    """What the sample call of every operator gives in another torch, through the same library."""
    version, form = request.param
    if torch.__version__.startswith(version):
        pytest.skip(f"torch {version} is the version of this environment")
    python = interpreter(version)
    folder = tmp_path_factory.mktemp("abi")
    env = {k: v for k, v in os.environ.items() if k not in ("N3_BACKEND", "N3_LIBRARY")} | {"CUDA_VISIBLE_DEVICES": ""}
    if form == "tree":
        env |= {"PYTHONPATH": str(ROOT), "N3_LIBRARY": str(n3kernels._library)}
    else:
        env["PYTHONPATH"] = str(folder / "installed")
        made = request.getfixturevalue("wheel")
        pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--target", folder / "installed", made]
        subprocess.run(pip, check=True)
        doctor = [python, "-m", "n3kernels", "doctor"]
        subprocess.run(doctor, env=env, cwd=folder, check=True, capture_output=True)
    calls, results = folder / "calls.pt", folder / "results.pt"
    torch.save({name: sample(name) for name in SAMPLES}, calls)
    probe = Path(__file__).with_name("abi_probe.py")
    done = subprocess.run([python, probe, calls, results], env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(results, weights_only=True)


def test_the_wheel_is_of_no_python(wheel):
    import zipfile

    assert "-py3-none-manylinux" in wheel.name
    assert wheel.stat().st_size < 20e6 or "N3_ABI_WHEEL" in os.environ  # CUDA takes what its architectures take
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if "_host" in n or n.endswith((".cpp", ".cu", ".h"))]
    assert {"n3kernels/_C.so", "n3kernels/_build.json", "n3kernels/tiny/model.safetensors"} <= set(names)
    assert any(n.startswith("n3kernels/triton_ops/") for n in names)
    assert any(fnmatch(n, "n3kernels/benchmarks/results/*/history.jsonl") for n in names)  # what runs are compared with


def test_is_another_torch(other):
    assert other["torch"].split("+")[0] != torch.__version__.split("+")[0]


@pytest.mark.parametrize("name", SAMPLES)
def test_same_answers(other, name):
    """The library's kernels give the same bits; the reference is torch's own arithmetic, and that may change."""
    backend, outs, written = other["results"][name]
    args, kwargs = sample(name)
    out = n3kernels._dispatch.OPS[name].overload(*args, **kwargs)
    ours = [out] if isinstance(out, torch.Tensor) else list(out or ())
    ours += [a for a in args if isinstance(a, torch.Tensor)]
    assert backend == n3kernels.explain(name).backend
    for mine, theirs in zip(ours, [*outs, *written], strict=True):
        if backend == "cpu" or not mine.is_floating_point() or mine.itemsize == 1:
            assert_same_bits(mine, theirs)
        else:
            torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4, equal_nan=True)
