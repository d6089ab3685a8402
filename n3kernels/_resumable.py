"""A folder that is written file by file, by a run that may be stopped and go on later.

A file is there under its name only when it is whole. A manifest says what the run is and which files are done; it goes
when everything is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from .nemotron.config import CheckpointError

__all__ = ["MANIFEST", "claimed", "finish", "write", "write_json", "write_manifest"]

MANIFEST = ".n3kernels-quantize.json"


@contextlib.contextmanager
def claimed(dst: Path, src: Path, identity: Mapping[str, Any]) -> Iterator[dict[str, int]]:
    """Holds ``dst`` against other processes; the shards that are done in it, with their sizes."""
    if dst.exists() and not dst.is_dir():
        raise CheckpointError(f"{dst}: is no folder")
    if dst.exists() and dst.samefile(src):
        raise CheckpointError(f"{dst}: is the folder to read from")
    dst.mkdir(parents=True, exist_ok=True)
    folder = os.open(dst, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however that ends
        except BlockingIOError:
            raise CheckpointError(f"{dst}: another process is writing to it") from None
        if not any(dst.iterdir()):
            write_manifest(dst, identity, {})
        yield _read_manifest(dst, identity)
    finally:
        os.close(folder)


def _read_manifest(dst: Path, identity: Mapping[str, Any]) -> dict[str, int]:
    try:
        manifest = json.loads((dst / MANIFEST).read_text())
        done = {str(file): int(size) for file, size in manifest.pop("done").items()}
    except FileNotFoundError:
        what = "holds a checkpoint already" if (dst / "config.json").exists() else "is not empty"
        raise CheckpointError(f"{dst}: {what}; give a new folder") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise CheckpointError(f"{dst / MANIFEST}: is damaged; remove the folder to begin again") from None
    for key, value in identity.items():
        if manifest.get(key) != json.loads(json.dumps(value)):
            raise CheckpointError(f"{dst}: was begun with another {key}; remove it to begin again")
    return done


def write(dst: Path, name: str, fill: Callable[[BinaryIO], None]) -> None:
    """A file that is there under its name only when it is whole and on the disk."""
    part = dst / f".{name}.part"
    with part.open("w+b") as out:
        fill(out)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, dst / name)
    folder = os.open(dst, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_json(dst: Path, name: str, value: Any) -> None:
    write(dst, name, lambda out: out.write((json.dumps(value, indent=2) + "\n").encode()))


def write_manifest(dst: Path, identity: Mapping[str, Any], done: Mapping[str, int]) -> None:
    write_json(dst, MANIFEST, {**identity, "done": done})


def finish(dst: Path) -> None:
    """Removes what only an unfinished folder needs."""
    for left in dst.glob(".*.part"):
        left.unlink()
    (dst / MANIFEST).unlink()
