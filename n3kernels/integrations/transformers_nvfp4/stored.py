"""The layers of a checkpoint as its files hold them: what each is stored as, and whether it is complete."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from ..._safetensors import Entry, read_header
from ...nemotron.config import CheckpointError
from .config import DENSE, FP8, NVFP4
from .layers import COMPRESSED_TENSORS, MODELOPT, Format

__all__ = ["FLOATING", "STATIC", "Layer", "common_scalars", "read_layers"]

FLOATING = ("F64", "F32", "F16", "BF16")
# Static scales of activations, of keys and of values, which products of unquantised activations do not need.
STATIC = re.compile(r"(.*_)?(input|output|[qkv]|kv)(_global)?_scale")


@dataclass(frozen=True)
class Layer:
    """The tensors that a checkpoint keeps under one name, by the last part of theirs."""

    name: str
    leaves: dict[str, Entry] = field(default_factory=dict)

    @property
    def format(self) -> Format:
        return COMPRESSED_TENSORS if COMPRESSED_TENSORS.codes in self.leaves else MODELOPT

    @cached_property
    def scheme(self) -> str | None:
        """`NVFP4`, `FP8`, `DENSE`; None for what holds no weight. Raises `CheckpointError` for any other storage."""
        weight = self.leaves.get(self.format.codes)
        if weight is None:
            return None
        if weight.dtype in FLOATING:
            return DENSE
        if weight.dtype == "F8_E4M3":
            self._expect("weight_scale", FLOATING, ())
            self._expect_no_more("weight", "weight_scale")
            return FP8
        if weight.dtype == "U8" and len(weight.shape) == 2:
            rows, columns = weight.shape[0], 2 * weight.shape[1]
            if columns % 16:
                raise CheckpointError(f"{self.name}: NVFP4 needs a multiple of 16 columns, got {columns}")
            self._expect("weight_scale", ("F8_E4M3",), (rows, columns // 16))
            self._expect(self.format.global_scale, ("F32",), ())
            self._expect_no_more(*self.format.names)
            return NVFP4
        stored = f"{weight.dtype} {list(weight.shape)}"
        raise CheckpointError(f"{self.name}.{self.format.codes} must be NVFP4, FP8 or dense, got {stored}")

    def _expect(self, leaf: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        """``shape`` () is one element, whether it is stored with a dimension or without."""
        if leaf not in self.leaves:
            raise CheckpointError(f"{self.name}.{leaf} is missing; there are {', '.join(sorted(self.leaves))}")
        found = self.leaves[leaf]
        same = found.shape == shape or (not shape and torch.Size(found.shape).numel() == 1)
        if found.dtype not in dtypes or not same:
            want = f"{' or '.join(dtypes)} {list(shape) if shape else 'of 1 element'}"
            raise CheckpointError(f"{self.name}.{leaf} must be {want}, got {found.dtype} {list(found.shape)}")

    def _expect_no_more(self, *names: str) -> None:
        """A further tensor, such as AWQ's ``pre_quant_scale``, would change what the weight means."""
        for leaf in sorted(self.leaves):
            if leaf not in (*names, "bias") and not STATIC.fullmatch(leaf):
                raise CheckpointError(f"{self.name}.{leaf} is not served beside a packed weight")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, unpacked."""
        *rows, columns = self.leaves[self.format.codes].shape
        return (*rows, columns * (2 if self.scheme == NVFP4 else 1))

    def scalars(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype and shape of the layer's one-element tensors: its global scale and static scales."""
        return {
            leaf: (entry.dtype, entry.shape)
            for leaf, entry in self.leaves.items()
            if leaf == self.format.global_scale or (STATIC.fullmatch(leaf) and torch.Size(entry.shape).numel() == 1)
        }


def read_layers(files: Iterable[str] | None) -> dict[str, Layer]:
    """Every layer of a checkpoint by its name, from the headers of its files."""
    paths = [Path(file) for file in files or ()]
    if not paths or any(path.suffix != ".safetensors" for path in paths):
        raise CheckpointError("a quantized checkpoint is loaded from its *.safetensors files, and there are none")
    layers: dict[str, Layer] = {}
    for path in paths:
        for name, entry in read_header(path).tensors.items():
            prefix, _, leaf = name.rpartition(".")
            layers.setdefault(prefix, Layer(prefix)).leaves[leaf] = entry
    return layers


def common_scalars(layers: Iterable[Layer]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The one-element tensors that all these layers have, alike."""
    first, *rest = (layer.scalars() for layer in layers)
    return {leaf: value for leaf, value in first.items() if all(other.get(leaf) == value for other in rest)}
