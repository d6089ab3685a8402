"""Builds the wheel for this platform: `python scripts/build_wheel.py dist`, or `make wheel`.

One wheel serves every Python and every torch that pyproject.toml allows: the library is built on torch's stable ABI and
on no Python. auditwheel finds the oldest manylinux that its symbols allow and tags it so; torch's libraries stay out.
N3_CUDA and N3_CUDA_ARCHS choose what is in it, as in every build.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libc10.so")


def build(destination: Path) -> Path:
    """The path of the wheel, which is written to ``destination``."""
    shutil.rmtree(ROOT / "build" / "lib", ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        env = {**os.environ, "N3_WHEEL": "ON"}
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", scratch, ROOT]
        subprocess.run(pip, check=True, env=env)
        raw = next(Path(scratch).glob("*.whl"))
        excluded = [option for name in OF_TORCH for option in ("--exclude", name)]
        repair = [sys.executable, "-m", "auditwheel", "repair", *excluded, "-w", Path(scratch) / "repaired", raw]
        subprocess.run(repair, check=True, capture_output=True)
        wheel = next((Path(scratch) / "repaired").glob("*.whl"))
        destination.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(wheel, destination))


if __name__ == "__main__":
    made = build(Path(sys.argv[1] if len(sys.argv) > 1 else "dist"))
    print(f"{made}: {made.stat().st_size / 1e6:.1f} MB")
