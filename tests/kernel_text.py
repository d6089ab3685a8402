"""The text of CUDA kernels compiled for the CPU: the libraries of tests/cuda_emulator."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
needs_emulator = pytest.mark.skipif(
    not shutil.which("g++") or not (ROOT / "csrc").is_dir(), reason="needs g++ and the sources"
)
# What is read or written through a pointer to a vector must lie as a GPU wants it: the process ends where it does not.
ALIGNED = ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]


@functools.cache
def load(source: str, csrc: Path = ROOT / "csrc", system: tuple[Path, ...] = ()) -> ctypes.CDLL:
    """``tests/cuda_emulator/<source>`` with the kernels that it includes from ``csrc``, once per process; headers of
    others are in ``system``."""
    emulator = ROOT / "tests" / "cuda_emulator"
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-fPIC", "-shared", *ALIGNED, f"-I{csrc}", f"-I{emulator}"]
    flags += [flag for folder in system for flag in ("-isystem", str(folder))]
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "emulated.so"
        subprocess.run(["g++", *flags, str(emulator / source), "-o", str(built)], check=True)
        return ctypes.CDLL(str(built))
