"""One library for every torch: the ``_C.so`` of this working tree, loaded in other versions, gives the same answers.

Each version of N3_ABI_TORCH (default: the floor, 2.11.0, and 2.14.1) gets a virtual environment under build/abi, which
is kept. Where pip cannot install one, because there is no network, the tests are skipped and say so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_same_bits

import n3kernels
from n3kernels._samples import SAMPLES, sample

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = os.environ.get("N3_ABI_TORCH", "2.11.0 2.14.1").split()

pytestmark = pytest.mark.slow


def interpreter(version: str) -> Path:
    """A Python with torch ``version`` and nothing of this environment."""
    folder = ROOT / "build" / "abi" / version
    python = folder / "bin" / "python"
    if not (folder / ".ready").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "install", "-q", "--no-compile", f"torch=={version}", "numpy", "safetensors"]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            pytest.skip(f"torch {version} cannot be installed here: {reason}")
        (folder / ".ready").touch()
    return python


@pytest.fixture(scope="module", params=VERSIONS)
def other(request, tmp_path_factory):
    """What the sample call of every operator gives in another torch, through the same library."""
    if torch.__version__.startswith(request.param):
        pytest.skip(f"torch {request.param} is the version of this environment")
    python = interpreter(request.param)
    folder = tmp_path_factory.mktemp("abi")
    calls, results = folder / "calls.pt", folder / "results.pt"
    torch.save({name: sample(name) for name in SAMPLES}, calls)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "N3_LIBRARY": str(n3kernels._library)}
    env.pop("N3_BACKEND", None)
    probe = Path(__file__).with_name("abi_probe.py")
    done = subprocess.run([python, probe, calls, results], env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(results, weights_only=True)


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
        if backend == "cpu" or not mine.is_floating_point():
            assert_same_bits(mine, theirs)
        else:
            torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4, equal_nan=True)
