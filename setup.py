"""Builds n3kernels: runs CMake (CMakeLists.txt is the build description) and copies what it made.

Environment variables:

    N3_CUDA        AUTO (default): CUDA kernels for the visible GPU, the CPU only where none is visible;
                   ON: CUDA kernels with or without a GPU; OFF: the CPU only.
    N3_CUDA_ARCHS  architectures to build, e.g. "90a;100a;120a" (default: the visible GPU's, else these three).
    N3_CUTLASS_DIR a CUTLASS checkout; default: the headers of the nvidia-cutlass package.
    MAX_JOBS       compile jobs at a time (default: the number of cores).
    N3_SANITIZE    ON: AddressSanitizer and UBSan (`make sanitize`).
    N3_WHEEL       ON: a wheel for every Python, without the _host module, which is of one (`make wheel`).
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
WHEEL = os.environ.get("N3_WHEEL", "OFF") == "ON"


def package_dir(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec else None


def cmake_options(output: Path) -> dict[str, str]:
    torch = package_dir("torch")
    if torch is None:
        sys.exit("n3kernels: torch >= 2.11 must be installed before the build: pip install torch, then "
                 "pip install --no-build-isolation .")
    cutlass = package_dir("cutlass_library")
    version = dict(line.split(" = ") for line in (torch / "version.py").read_text().splitlines() if " = '" in line)
    return {
        "Python_EXECUTABLE": sys.executable,
        "TORCH_DIR": str(torch),
        "N3_TORCH_VERSION": version.get("__version__", "unknown").strip("'"),
        "pybind11_DIR": str(package_dir("pybind11") / "share/cmake/pybind11"),
        "N3_CUTLASS_DIR": os.environ.get("N3_CUTLASS_DIR") or (str(cutlass / "source") if cutlass else ""),
        "N3_CUDA": os.environ.get("N3_CUDA", "AUTO").upper(),
        "N3_CUDA_ARCHS": os.environ.get("N3_CUDA_ARCHS", "").replace(" ", ";"),
        "N3_SANITIZE": os.environ.get("N3_SANITIZE", "OFF"),
        "N3_OUTPUT_DIR": str(output),
    }


class CMakeBuild(build_ext):
    def run(self):
        output = Path(self.build_lib) / "n3kernels" if not self.inplace else ROOT / "n3kernels"
        kind = "sanitize" if os.environ.get("N3_SANITIZE", "OFF") == "ON" else "cmake"
        folder = ROOT / "build" / kind
        output.mkdir(parents=True, exist_ok=True)
        options = [f"-D{key}={value}" for key, value in cmake_options(output.resolve()).items()]
        subprocess.check_call(["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *options])
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        target = ["--target", "_C"] if WHEEL else []
        subprocess.check_call(["cmake", "--build", folder, "-j", jobs, *target])

    def get_outputs(self):
        return []


class Wheel(bdist_wheel):
    """The library is of no Python: its tag may say so where _host is left out."""

    def get_tag(self):
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if WHEEL else tag


# The name is a placeholder that makes setuptools run build_ext and tag the wheel as platform-specific.
setup(
    ext_modules=[Extension("n3kernels._C", [])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
    exclude_package_data={"n3kernels": ["_host*"]} if WHEEL else {},  # of an in-place build
)
