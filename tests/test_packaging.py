"""What is installed, and what is in a source distribution, is what is in the tree."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml with Python 3.11's parser")
ROOT = Path(__file__).parent.parent
OPS = ()
NOT_PACKED = ("*.png", ".ci/*", ".github/*", ".gitignore")  # recorded plots; what forges and git read


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs a source tree")
def test_every_package_is_listed():
    """A folder that pyproject.toml does not name works in a checkout and is missing from an installation."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    places = {"n3kernels": ROOT / "n3kernels"}
    places |= {name: ROOT / folder for name, folder in tool["package-dir"].items()}
    found = set()
    for name, folder in places.items():
        for file in folder.rglob("*.py"):
            found.add(".".join([name, *file.parent.relative_to(folder).parts]))
    assert found == set(tool["packages"])


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="compares with what git knows of")
def test_the_source_distribution_holds_the_checkout(tmp_path):
    """All that a build, the tests and the documentation need, and nothing that a build left behind."""
    command = [sys.executable, str(ROOT / "scripts" / "build_sdist.py"), str(tmp_path), "--only"]
    subprocess.run(command, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        packed = {m.name.split("/", 1)[1] for m in archive.getmembers() if m.isfile()} - {"PKG-INFO", "setup.cfg"}
    git = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    known = subprocess.run(git, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    known = {name for name in known if name and (ROOT / name).is_file()}  # a deleted file is still known
    known = {name for name in known if not any(fnmatch(name, pattern) for pattern in NOT_PACKED)}
    assert packed - known == set(), "packed, but no part of the checkout"
    assert known - packed == set(), "missing: MANIFEST.in does not name them"
