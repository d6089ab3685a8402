"""What scripts/compile_cuda.py reads out of a compiler's output."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "compile_cuda.py"
OPS = ()
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="needs a source tree")

# As CMake, Ninja and ptxas of CUDA 13.0 print it; one of the two files is well.
BUILD = """\
[1/3] Building CUDA object CMakeFiles/n3_cuda.dir/csrc/moe/good_sm90.cu.o
ptxas info    : (C7519) warpgroup.arrive is injected in around line 42 by compiler to allow use of registers in GMMA \
in function '_ZN2n311good_kernelEPfmm'
[2/3] Building CUDA object CMakeFiles/n3_cuda.dir/csrc/moe/bad_sm90.cu.o
ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to insufficient \
register resources for the wgmma pipeline in the function '_ZN2n317serialized_kernelEPfmm'
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma \
instructions defining accumulator registers of a wgmma between start and end of the pipeline stage in the function \
'_ZN2n312other_kernelEPfmm'
[3/3] Linking CXX shared module lib/_C.so
"""


@pytest.fixture
def folder(tmp_path):
    for name in ("good", "bad"):
        path = tmp_path / "CMakeFiles" / "n3_cuda.dir" / "csrc" / "moe" / f"{name}_sm90.cu.o"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path


def test_serialised_products_are_found(folder):
    first, second = runpy.run_path(str(SCRIPT))["serialized"](BUILD.splitlines(), folder)
    reason = "insufficient register resources for the wgmma pipeline"
    assert "serialized_kernel" in first and first.endswith(f": wgmma instructions are serialised: {reason}")
    assert "other_kernel" in second and "accumulator registers" in second


def test_their_objects_are_deleted_so_that_the_next_run_says_it_again(folder):
    runpy.run_path(str(SCRIPT))["serialized"](BUILD.splitlines(), folder)
    assert [path.name for path in folder.rglob("*.o")] == ["good_sm90.cu.o"]


def test_a_sound_build_says_nothing(folder):
    sound = [line for line in BUILD.splitlines() if "serialized" not in line]
    assert runpy.run_path(str(SCRIPT))["serialized"](sound, folder) == [] and len(list(folder.rglob("*.o"))) == 2
