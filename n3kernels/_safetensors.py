"""safetensors files by their headers, for what `safetensors` itself reads whole: sizes without data, and tensors of any
size through a buffer of a given size.

A file is 8 bytes of header length (little endian), the header (JSON: name -> dtype, shape, offsets), then the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .nemotron.config import CheckpointError

__all__ = ["DTYPES", "Entry", "Header", "data_sizes", "read_header", "read_rows", "write_header"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class Entry(NamedTuple):
    """A tensor in a file; ``start`` and ``end`` are byte offsets from the file's first byte."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


class Header(NamedTuple):
    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The tensors of a file in the order of their data. Raises `CheckpointError` for a file that is not whole."""
    try:
        with safe_open(str(path), "pt"):  # checks that offsets are in order and the file is as long as they say
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            raw = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a complete safetensors file: {error}") from None
    metadata = raw.pop("__metadata__", None) or {}
    entries = {
        name: Entry(value["dtype"], tuple(value["shape"]), *(8 + length + offset for offset in value["data_offsets"]))
        for name, value in raw.items()
    }
    return Header(dict(sorted(entries.items(), key=lambda item: item[1].start)), metadata)


def read_rows(file: BinaryIO, entry: Entry, most_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """A tensor as a matrix ``[rows, last dimension]``, in pieces of whole rows: ``first row, piece``.

    Pieces take at most ``most_bytes`` (one row at least) and share one buffer: what is yielded holds until the next.
    """
    width = entry.shape[-1]
    row_bytes = width * DTYPES[entry.dtype].itemsize
    rows = entry.size // row_bytes if row_bytes else 0
    step = min(rows, max(1, most_bytes // max(row_bytes, 1)))
    room = torch.empty(step * row_bytes, dtype=torch.uint8)
    for row in range(0, rows, step or 1):
        count = min(step, rows - row)
        piece = room[: count * row_bytes]
        file.seek(entry.start + row * row_bytes)
        if file.readinto(memoryview(piece.numpy())) != piece.numel():
            raise CheckpointError(f"{file.name}: ends before its tensors do")
        yield row, piece.view(DTYPES[entry.dtype]).view(count, width)


def data_sizes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, int]:
    """Bytes of each tensor, given ``name -> dtype, shape``."""
    return {name: torch.Size(shape).numel() * DTYPES[dtype].itemsize for name, (dtype, shape) in tensors.items()}


def write_header(
    file: BinaryIO, tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> dict[str, Entry]:
    """Writes the header of a file with these tensors (``name -> dtype, shape``), gives the file its full length, and
    says where each tensor's bytes belong: wide elements first, so that all are aligned, as `safetensors` has them."""
    offset, raw = 0, {"__metadata__": dict(metadata)} if metadata else {}
    sizes = data_sizes(tensors)
    for name in sorted(tensors, key=lambda name: (-DTYPES[tensors[name][0]].itemsize, name)):
        dtype, shape = tensors[name]
        raw[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + sizes[name]]}
        offset += sizes[name]
    text = json.dumps(raw, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    begin = file.tell()
    file.truncate(begin + offset)
    offsets = {name: raw[name]["data_offsets"] for name in tensors}
    return {name: Entry(*tensors[name], begin + start, begin + end) for name, (start, end) in offsets.items()}
