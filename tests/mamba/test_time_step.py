"""The softplus of Triton's kernels: as exact as its docstring says, in the interpreter and in machine code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEVICE

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
OPS = ()
KERNEL = '''
import sys
import triton
import triton.language as tl
from n3kernels.triton_ops.mamba.numerics import _log1p


@triton.jit
def kernel(u_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, _log1p(tl.load(u_ptr + at)))


if __name__ == "__main__":
    from triton.backends.compiler import GPUTarget

    signature = {"u_ptr": "*fp32", "y_ptr": "*fp32", "BLOCK": "constexpr"}
    source = triton.compiler.ASTSource(kernel, signature, {"BLOCK": 128})
    sys.stdout.write(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"])
'''


@pytest.fixture(scope="module")
def kernel(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("kernel") / "log1p_kernel.py"
    path.write_text(KERNEL)
    return path


def test_log1p_to_two_ten_millionths(kernel, monkeypatch):
    monkeypatch.syspath_prepend(kernel.parent)
    import log1p_kernel

    bits = torch.linspace(0x00800000, 0x3F800000, 1 << 16, dtype=torch.float64).int()  # every exponent up to 1
    u = torch.cat([bits.view(torch.float32), torch.linspace(0, 1, 1 << 16)]).to(DEVICE)
    y = torch.empty_like(u)
    log1p_kernel.kernel[(u.numel() // 1024,)](u, y, BLOCK=1024)
    truth = torch.log1p(u.double())
    assert (y.double() - truth).abs().le(2e-7 * truth).all()


def test_its_division_is_rounded_once(kernel):
    """Triton's `/` is div.full in machine code, which the interpreter does not show."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, str(kernel)], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.count("div.rn.f32") >= 1 and "div.full" not in run.stdout
