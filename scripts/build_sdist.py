"""Builds the source distribution and proves it: `python scripts/build_sdist.py dist`, or `make sdist`.

It holds what the checkout holds, tests and documentation included, but for recorded plots and the files of forges:
`make test` works in what is unpacked. The proof is an installation from it: into a virtual environment of its own that
borrows torch and the rest from this one, without the network, where `n3kernels doctor` then checks every operator. With
--only there is no proof.
"""

from __future__ import annotations

import argparse
import os
import site
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(destination: Path) -> Path:
    """The path of the archive, which is written to ``destination``; nothing else is written."""
    destination = destination.resolve()
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "setup.py", "-q", "egg_info", "-e", scratch, "sdist", "-d", destination]
        subprocess.run([*command, "--formats=gztar"], check=True, cwd=ROOT)
    return max(destination.glob("n3kernels-*.tar.gz"), key=lambda path: path.stat().st_mtime)


def prove(archive: Path) -> None:
    """Installs ``archive`` somewhere else and runs it there; raises CalledProcessError where that fails."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        venv.create(folder / "env")  # without a pip and a setuptools of its own, which are those of Python's release
        python = folder / "env" / "bin" / "python"
        # The packages of this environment, but not its .pth files: an editable n3kernels stays out.
        borrowed = "\n".join(path for path in site.getsitepackages() if Path(path).is_dir())
        (next((folder / "env" / "lib").glob("python*")) / "site-packages" / "borrowed.pth").write_text(borrowed + "\n")
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "N3_LIBRARY")}
        offline = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
        subprocess.run([python, "-m", "pip", "install", "-q", *offline, archive], check=True, cwd=folder, env=env)
        where = "import n3kernels; print(n3kernels.__file__)"
        found = subprocess.run([python, "-c", where], check=True, cwd=folder, env=env, capture_output=True, text=True)
        if not Path(found.stdout.strip()).is_relative_to(folder):
            sys.exit(f"build_sdist: {found.stdout.strip()} was imported, not what {archive.name} installed")
        subprocess.run([python, "-m", "n3kernels", "doctor"], check=True, cwd=folder, env=env)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Builds the source distribution and proves it.")
    parser.add_argument("destination", type=Path, nargs="?", default=Path("dist"))
    parser.add_argument("--only", action="store_true", help="build it, prove nothing")
    options = parser.parse_args()
    made = build(options.destination)
    if not options.only:
        prove(made)
    print(f"{made}: {made.stat().st_size / 1e6:.1f} MB")
