"""Writes a dense checkpoint as NVFP4 in ModelOpt's layout, shard by shard, in little memory.

Linear weights become ``.weight`` (codes), ``.weight_scale`` and ``.weight_scale_2``; everything else is copied byte for
byte. Tensors pass through memory in pieces of `PIECE` bytes. Files appear under their names only when they are whole,
and a run that was stopped goes on where it was: finished shards are not written again.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ._recipes import RECIPES, choose, collapse, fused
from ._resumable import MANIFEST, claimed, finish, write, write_json, write_manifest
from ._safetensors import DTYPES, Entry, Header, data_sizes, read_header, read_rows, write_header
from .nemotron.checkpoint import INDEX, _named_in_index
from .nemotron.config import CheckpointError
from .nvfp4 import quantize

__all__ = ["Job", "Row"]

PIECE = 32 * 2**20  # bytes of a tensor that are in memory at a time
_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|index\.json|part)$")
_WRITTEN = ("config.json", "hf_quant_config.json", MANIFEST)


@dataclass
class Row:
    """Tensors that differ in numbers alone, as a dry run lists them."""

    name: str
    count: int
    shape: tuple[int, ...] | None  # None: not all the same
    dtype: str
    reason: str | None  # why they are kept; None: they are packed
    before: int
    after: int


class Job:
    """One conversion, planned from the headers of ``src``.

    Args:
        src: folder with ``config.json``, ``*.safetensors`` and, for several, their index.
        recipe: a key of `RECIPES`.
        exclude: patterns of layers to keep dense.
        device: where to quantise.
    Raises:
        CheckpointError: ``src`` cannot be read or is quantised already; ``exclude`` matches nothing.
    """

    def __init__(self, src: Path, recipe: str, exclude: Iterable[str] = (), device: str = "cpu"):
        self.src, self.recipe, self.exclude, self.device = src, recipe, sorted(exclude), torch.device(device)
        self.config = _read_config(src)
        self.shards = _read_shards(src)
        self.tensors = {name: entry for header in self.shards.values() for name, entry in header.tensors.items()}
        self.where = {name: file for file, header in self.shards.items() for name in header.tensors}
        self.reasons = choose(self.tensors, self.config, self.exclude)
        self.packed = [name for name, reason in self.reasons.items() if reason is None]
        if not self.packed:
            raise CheckpointError(f"{src}: there is no weight to quantize")
        self._groups = fused(self.packed)
        self._amax: dict[str, float] = {}

    # ------------------------------------------------------------ what there is to do

    @cached_property
    def outputs(self) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
        """For every shard the tensors it will hold: ``name -> dtype, shape``."""
        return {
            file: {new: stored for name, entry in header.tensors.items() for new, stored in self._output(name, entry)}
            for file, header in self.shards.items()
        }

    def _output(self, name: str, entry: Entry) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
        if self.reasons[name] is not None:
            yield name, (entry.dtype, entry.shape)
            return
        rows, columns = entry.shape
        yield name, ("U8", (rows, columns // 2))
        yield f"{name}_scale", ("F8_E4M3", (rows, columns // 16))
        yield f"{name}_scale_2", ("F32", ())

    @cached_property
    def total_size(self) -> int:
        return sum(sum(data_sizes(tensors).values()) for tensors in self.outputs.values())

    @property
    def work(self) -> int:
        """Bytes that `run` reports as done in the end."""
        return sum(entry.size for entry in self.tensors.values())

    def rows(self) -> list[Row]:
        rows: dict[tuple[str, str | None], Row] = {}
        for name, entry in self.tensors.items():
            family, reason = re.sub(r"(?<=\.)\d+(?=\.)", "*", name), self.reasons[name]
            after = sum(data_sizes(dict(self._output(name, entry))).values())
            row = rows.setdefault((family, reason), Row(family, 0, entry.shape, entry.dtype, reason, 0, 0))
            row.count, row.before, row.after = row.count + 1, row.before + entry.size, row.after + after
            row.shape = row.shape if row.shape == entry.shape else None
        return list(rows.values())

    # ------------------------------------------------------------ doing it

    def run(self, dst: Path, progress: Callable[[int, str], None] = lambda size, file: None) -> list[str]:
        """Writes the checkpoint to the folder ``dst``, or what is left of it.

        Args:
            dst: a folder that does not exist, is empty, or holds the beginning of this very conversion.
            progress: called with a number of bytes of ``src`` that are done and the shard they belong to.
        Returns:
            The shards that were there already.
        Raises:
            CheckpointError: ``dst`` holds anything else, there is too little space, or a weight is not finite.
        """
        with claimed(dst, self.src, self._identity()) as done:
            there = [file for file in self.shards if self._is_done(dst, file, done)]
            self._check_space(dst, there)
            for file in self.shards:
                if file in there:
                    progress(self._source_size(file), file)
                    continue
                write(dst, file, lambda out, file=file: self._write_shard(out, file, progress))
                done[file] = (dst / file).stat().st_size
                write_manifest(dst, self._identity(), done)
            self._write_the_rest(dst)
        return there

    def _identity(self) -> dict[str, Any]:
        """What a conversion goes on with must be the same as what it began with."""
        stats = {file: (self.src / file).stat() for file in (*self.shards, "config.json")}
        return {
            "source": {file: [stat.st_size, stat.st_mtime_ns] for file, stat in stats.items()},
            "recipe": self.recipe,
            "exclude": self.exclude,
        }

    def _is_done(self, dst: Path, file: str, done: Mapping[str, int]) -> bool:
        return file in done and (dst / file).is_file() and (dst / file).stat().st_size == done[file]

    def _source_size(self, file: str) -> int:
        return sum(entry.size for entry in self.shards[file].tensors.values())

    def _check_space(self, dst: Path, there: list[str]) -> None:
        need = sum(sum(data_sizes(t).values()) for file, t in self.outputs.items() if file not in there)
        free = shutil.disk_usage(dst).free
        if free < need:
            raise CheckpointError(f"{dst}: {need / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free")

    def _write_shard(self, out: BinaryIO, file: str, progress: Callable[[int, str], None]) -> None:
        header = self.shards[file]
        places = write_header(out, self.outputs[file], header.metadata or {"format": "pt"})
        with (self.src / file).open("rb") as source:
            for name, entry in header.tensors.items():
                if self.reasons[name] is None:
                    self._pack(source, out, name, entry, places)
                else:
                    _copy(source, out, entry, places[name])
                progress(entry.size, file)

    def _pack(self, source: BinaryIO, out: BinaryIO, name: str, entry: Entry, places: Mapping[str, Entry]) -> None:
        """Quantises a weight as the rows it is of all that share its global scale.

        The global scale follows from the largest magnitude among all of them, which is put below every piece in a row
        of its own: each piece then gets the very bytes that `quantize` would give it in the whole.
        """
        largest = max(self._largest(member) for member in self._groups[name])
        dtypes = {self.tensors[member].dtype for member in self._groups[name]}
        dtype = DTYPES[entry.dtype] if len(dtypes) == 1 else torch.float32
        room = torch.empty(0, dtype=dtype, device=self.device)  # one for all pieces: the heap grows with a new one each
        for row, piece in read_rows(source, entry, PIECE):
            padded = room.resize_(len(piece) + 1, piece.shape[1])
            padded[:-1] = piece
            padded[-1] = 0
            padded[-1, 0] = largest
            w = quantize(padded, four_over_six=RECIPES[self.recipe])
            for key, part in ((name, w.q), (f"{name}_scale", w.block_scale)):
                place = places[key]
                out.seek(place.start + row * (place.size // entry.shape[0]))
                out.write(_bytes(part[:-1]))
        out.seek(places[f"{name}_scale_2"].start)
        out.write(_bytes(w.global_scale))

    def _largest(self, name: str) -> float:
        if name not in self._amax:
            found, file = 0.0, self.where[name]
            with (self.src / file).open("rb") as source:
                for _, piece in read_rows(source, self.tensors[name], PIECE):
                    low, high = (value.item() for value in piece.aminmax())
                    if not (abs(low) < float("inf") and abs(high) < float("inf")):  # NaN is no less either
                        raise CheckpointError(f"{self.src / file}: {name} must be finite, got NaN or infinity")
                    found = max(found, -low, high)
            self._amax[name] = found
        return self._amax[name]

    def _write_the_rest(self, dst: Path) -> None:
        for path in sorted(self.src.iterdir()):
            if path.is_file() and not _WEIGHTS.search(path.name) and path.name not in _WRITTEN:
                write(dst, path.name, lambda out, path=path: _copy_file(path, out))
        if len(self.shards) > 1:
            weight_map = {name: file for file, tensors in self.outputs.items() for name in tensors}
            index = {"metadata": {"total_size": self.total_size}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(dst, INDEX, index)
        quantization = self.quantization()
        nested = {key: quantization[key] for key in ("quant_algo", "kv_cache_quant_algo", "group_size")}
        nested["exclude_modules"] = quantization["ignore"]
        write_json(dst, "hf_quant_config.json", {"producer": quantization["producer"], "quantization": nested})
        del quantization["kv_cache_quant_algo"], quantization["group_size"]
        write_json(dst, "config.json", {**self.config, "quantization_config": quantization})
        finish(dst)

    def quantization(self) -> dict[str, Any]:
        """What ModelOpt would say of this checkpoint. Weights alone are quantised, unless the source has calibrated
        scales of the activations too."""
        from . import __version__

        packed = [name.removesuffix(".weight") for name in self.packed]
        kept = [
            name.removesuffix(".weight") for name, entry in self.tensors.items()
            if self.reasons[name] is not None and name.endswith(".weight") and len(entry.shape) > 1
        ]  # fmt: skip
        calibrated = all(f"{layer}.input_scale" in self.tensors for layer in packed)
        weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
        group = {"weights": weights, "targets": ["Linear"], **({"input_activations": weights} if calibrated else {})}
        return {
            "config_groups": {"group_0": group},
            "ignore": collapse(kept, packed),
            "quant_algo": "NVFP4" if calibrated else "W4A16_NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "producer": {"name": "n3kernels", "version": __version__},
            "quant_method": "modelopt",
        }


# ---------------------------------------------------------------- reading


def _read_config(src: Path) -> dict[str, Any]:
    if not src.is_dir():
        raise CheckpointError(f"{src}: no such folder")
    path = src / "config.json"
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(raw).__name__}")
    if "quantization_config" in raw or (src / "hf_quant_config.json").exists():
        raise CheckpointError(f"{src}: is quantized already")
    return raw


def _read_shards(src: Path) -> dict[str, Header]:
    files = sorted(_named_in_index(src)) or sorted(path.name for path in src.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{src}: holds no *.safetensors file")
    for file in files:
        if not (src / file).is_file():
            raise CheckpointError(f"{src / file}: no such file, but {INDEX} names it")
    shards = {file: read_header(src / file) for file in files}
    seen: dict[str, str] = {}
    for file, header in shards.items():
        for name, entry in header.tensors.items():
            if entry.dtype not in DTYPES:
                raise CheckpointError(f"{src / file}: {name} has the unknown type {entry.dtype}")
            if name in seen:
                raise CheckpointError(f"{src / file}: {name} is in {seen[name]} too")
            seen[name] = file
    return shards


def _copy(source: BinaryIO, out: BinaryIO, entry: Entry, place: Entry) -> None:
    source.seek(entry.start)
    out.seek(place.start)
    for left in range(entry.size, 0, -PIECE):
        out.write(source.read(min(left, PIECE)))


def _copy_file(path: Path, out: BinaryIO) -> None:
    with path.open("rb") as source:
        shutil.copyfileobj(source, out)


def _bytes(t: torch.Tensor) -> memoryview:
    return memoryview(t.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
