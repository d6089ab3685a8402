"""A test module run as a program, once per instruction set, and what it prints compared: ``name = digest`` by line.

AMX is not among the sets: there products of bfloat16 have sums of their own (test_linear_amx.py,
test_experts_amx.py)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SETS = ("generic", "avx2", "avx512")


def assert_same_bits_on_every_set(program: str) -> None:
    """``program`` prints the digests of its results, and as ``isa`` the set that it ran on."""
    pytest.importorskip("n3kernels._host", reason="_host, which names the instruction set, is of another Python")
    # A machine without one falls back to the next.
    results = {result.pop("isa"): result for result in (_run(program, isa) for isa in SETS)}
    first = results.pop("generic")
    for result in results.values():
        assert result == first


def _run(program: str, isa: str) -> dict[str, str]:
    env = {**os.environ, "N3_CPU_ISA": isa}
    out = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return dict(line.split(" = ") for line in out.stdout.splitlines())
