"""What is installed is what is in the tree."""

from __future__ import annotations

from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="reads pyproject.toml with Python 3.11's parser")
ROOT = Path(__file__).parent.parent
OPS = ()


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
