"""CUTLASS's collectives without a GPU: cutlass_collectives.cu compiled by nvcc, the host's half of it."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from kernel_text import ROOT

CUTLASS = importlib.util.find_spec("cutlass_library")
needs_nvcc = pytest.mark.skipif(not CUTLASS or not shutil.which("nvcc"), reason="needs nvcc and the headers of CUTLASS")


def cutlass_headers():
    return Path(CUTLASS.submodule_search_locations[0]) / "source" / "include"


class Call(ctypes.Structure):
    """nvfp4_gemm::Call."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "a_scale", "b", "b_scale", "a_global", "b_global")),
        ("a_global_per_row", ctypes.c_bool), ("b_global_per_row", ctypes.c_bool),
        ("bias", ctypes.c_void_p), ("y", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("m", "n", "k")), ("sms", ctypes.c_int),
        ("scale", ctypes.c_void_p), ("scale_global", ctypes.c_void_p),  # of the result, where it is codes
        ("swizzled", ctypes.c_bool), ("relu2", ctypes.c_bool),
    ]  # fmt: skip


SEEN = ("a", "a_scale", "b", "b_scale", "a_global", "b_global", "bias", "y", "a_global_per_row", "b_global_per_row",
        "m", "n", "k", "scale", "scale_global", "swizzled", "relu2", "a_stride", "b_stride", "y_stride",
        "sms")  # fmt: skip
# of cutlass_collectives.cu
SMALL100, LARGE100, SQUARE120, FLOAT100, FLOAT120, CODES_SMALL100, CODES_LARGE100, CODES120, *GROUPED = range(10)
CODES = (CODES_SMALL100, CODES_LARGE100, CODES120)
DENSE = (SMALL100, LARGE100, SQUARE120, FLOAT100, FLOAT120, *CODES)
ON_120 = (SQUARE120, FLOAT120, CODES120)


@functools.cache
def collectives():
    """The collectives of every kernel; once per process, it takes a minute."""
    flags = ["-std=c++20", "-O0", "-w", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC", "-shared", "-arch=sm_100a"]
    paths = [f"-I{ROOT / 'csrc'}", "-isystem", str(cutlass_headers())]
    source = ROOT / "tests" / "nvfp4" / "cutlass_collectives.cu"
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "collectives.so"
        subprocess.run(["nvcc", *flags, *paths, str(source), "-o", str(built)], check=True)
        library = ctypes.CDLL(str(built))
    library.dense_arguments.restype = library.grouped_arguments.restype = ctypes.c_bool
    return library


def call_of(m, n, k, **given):
    """Addresses that nothing reads, each of its own."""
    addresses = {name: 4096 * (i + 1) for i, name in enumerate(SEEN[:8])}
    return Call(**(addresses | {"m": m, "n": n, "k": k, "sms": 148} | given))
