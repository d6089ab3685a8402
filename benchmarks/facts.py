"""Where and from what a measurement comes: what the examples write beside their figures, and captions repeat."""

from __future__ import annotations

import datetime
import json
import re
import subprocess
from pathlib import Path

import torch

import n3kernels

from . import roofs

__all__ = ["keep", "origin"]

ROOT = Path(__file__).resolve().parent.parent


def origin(device: str = "cpu") -> dict[str, str]:
    """Machine, commit (with a + where the tree had changes), versions and day."""
    return {
        "machine": roofs.device_name(device),
        "commit": _git("rev-parse", "--short=12", "HEAD") + "+" * bool(_git("status", "--porcelain", "-uno")),
        "torch": torch.__version__,
        "n3kernels": n3kernels.__version__,
        "date": datetime.date.today().isoformat(),
    }


def _git(*args: str) -> str:
    try:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # not a checkout
        return "" if args[0] == "status" else "unknown"


def keep(path: str | Path, data: dict) -> None:
    """Writes figures and their origin as JSON, numbers to four digits."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"origin": origin(), **_short(data)}, indent=1)
    flat = re.sub(r"\[[\s\d.,e+-]*\]", lambda list_: " ".join(list_[0].split()), text)  # numbers stay in one line
    path.write_text(flat.replace("[ ", "[").replace(" ]", "]") + "\n")


def _short(value):
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_short(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
