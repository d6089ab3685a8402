"""From the layers of a checkpoint to modules of a model of transformers: which are packed, where they go, and how
transformers is to join them.

The stored tensors decide, since they leave no doubt; the configuration is compared with them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from ..._safetensors import DTYPES
from ...nemotron.config import CheckpointError
from .. import transformers_moe as moe
from .config import DENSE, FP8, NVFP4
from .layers import FP8Linear, NVFP4Embedding, NVFP4Experts, NVFP4Linear, Packed, expert_buffer
from .stored import FLOATING, STATIC, Layer, common_scalars

__all__ = ["Plan"]


class Reshape(ConversionOps):
    """Gives one-element tensors a dimension to be joined in, and takes it back when they are saved."""

    def __init__(self, shape: tuple[int, ...], back: tuple[int, ...]):
        self.shape, self.back = shape, back

    def convert(self, input_dict: dict[str, Any], **kwargs) -> dict[str, Any]:
        def reshape(value: Any) -> Any:
            return [t.reshape(self.shape) for t in value] if isinstance(value, list) else value.reshape(self.shape)

        return {key: reshape(value) for key, value in input_dict.items()}

    @property
    def reverse_op(self) -> Reshape:
        return Reshape(self.back, self.shape)


class JoinRows(Concatenate):
    """Joins the rows of a layer's parts, and takes them apart where they were joined; `Concatenate` would take them
    apart in equal parts, which q, k and v are not."""

    @property
    def reverse_op(self) -> ConversionOps:
        return SplitRows(self.dim)


class SplitRows(Chunk):
    def convert(self, input_dict, source_patterns, target_patterns, full_layer_name, model, **kwargs):
        name = full_layer_name.replace(target_patterns[0], source_patterns[0]).rpartition(".")[0]
        parts = getattr(model.get_submodule(name), "parts", None)
        if parts is None:  # a layer that this checkpoint keeps dense
            return super().convert(input_dict, source_patterns, target_patterns, **kwargs)
        (value,) = input_dict.values()
        t = value[0] if isinstance(value, list) else value
        return {key: piece.contiguous() for key, piece in zip(target_patterns, t.split(parts), strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        return JoinRows(self.dim)


class Part(NamedTuple):
    """A layer of the checkpoint that is a parameter of the model, or a part of one that a converter joins."""

    layer: Layer
    converter: WeightConverter | None
    position: int  # of the layer's name among the converter's sources: the order of rows


class Plan:
    """Where the packed layers of a checkpoint go in ``model``, which is on the meta device.

    Attributes:
        modules: what replaces modules of the model, by their names.

    Raises `CheckpointError` for layers that are incomplete, of another shape than the model's, or not served.
    """

    def __init__(self, model: nn.Module, layers: dict[str, Layer], conversions: list):
        self.model, self.layers = model, layers
        self.state = model.state_dict()
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        by_pattern = {pattern: c for c in self._converters for pattern in c.source_patterns}
        self.parts: dict[str, list[Part]] = defaultdict(list)
        self._target: dict[str, str] = {}
        for layer in layers.values():
            target, pattern = self._place(f"{layer.name}.weight")
            self._target[layer.name] = target
            if target in self.state and layer.scheme is not None:
                converter = by_pattern.get(pattern)
                position = converter.source_patterns.index(pattern) if converter else 0
                self.parts[target].append(Part(layer, converter, position))
        self._copies: dict[tuple, WeightConverter] = {}
        self.modules: dict[str, Packed] = dict(self._replacements())
        self._static = list(self._static_scales())
        self._check_the_rest()

    def apply(self) -> None:
        """Puts the packed modules in their places."""
        for name, module in self.modules.items():
            self.model.set_submodule(name, module)
        for name, leaf, dtype, shape in self._static:
            self.model.get_submodule(name).register_buffer(leaf, torch.empty(shape, dtype=dtype))

    def joined(self, conversions: list) -> list:
        """The model's conversions, with those for the tensors of packed weights."""
        copies = dict(self._copies)
        return [copies.pop((*_identity(c), "weight"), c) for c in conversions] + list(copies.values())

    def _place(self, key: str) -> tuple[str, str | None]:
        """The model's name for a tensor of the checkpoint, found as transformers does, and the converter's pattern."""
        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self.state)
        if target not in self.state and key in self.state:
            return rename_source_key(key, [], [], prefix, self.state)
        return target, pattern

    # ------------------------------------------------------------ modules

    def _replacements(self) -> Iterator[tuple[str, Packed]]:
        experts: dict[str, dict[str, list[Part]]] = defaultdict(dict)
        for target, parts in self.parts.items():
            schemes = {part.layer.scheme for part in parts}
            if schemes == {DENSE}:
                continue
            if len(schemes) > 1 or len({part.layer.format for part in parts}) > 1:
                names = ", ".join(f"{part.layer.name} {part.layer.scheme}" for part in parts[:3])
                raise CheckpointError(f"{target} must be made of layers that are stored in one way, got {names}, ...")
            name, _, attribute = target.rpartition(".")
            if hasattr(self.model.get_submodule(name), "has_gate"):
                experts[name][attribute] = parts
            else:
                yield name, self._layer(name, attribute, sorted(parts, key=lambda part: part.position))
        for name, sides in experts.items():
            yield name, self._experts(name, sides)

    def _layer(self, name: str, attribute: str, parts: list[Part]) -> Packed:
        module, (layer, converter, _) = self.model.get_submodule(name), parts[0]
        kind, scheme = type(module), layer.scheme
        if attribute != "weight" or (kind, scheme) not in ((nn.Linear, NVFP4), (nn.Linear, FP8), (nn.Embedding, NVFP4)):
            raise CheckpointError(f"{layer.name}: {scheme} weights are not served in {name}, a {kind.__name__}")
        rows, columns = module.weight.shape
        shapes = [part.layer.shape for part in parts]
        if sum(shape[0] for shape in shapes) != rows or any(shape[1] != columns for shape in shapes):
            got = " and ".join(str(list(shape)) for shape in shapes)
            raise CheckpointError(f"{layer.name}: {name} must have a weight of shape {[rows, columns]}, got {got}")
        joins_rows = converter is not None and [repr(op) for op in converter.operations] == ["Concatenate(dim=0)"]
        if len(parts) > 1 and (kind is nn.Embedding or scheme == FP8 or not joins_rows):
            raise CheckpointError(f"{name}: cannot be joined of {len(parts)} {scheme} layers")
        buffers = self._layer_buffers(parts, len(parts) > 1)
        if kind is nn.Embedding:
            return NVFP4Embedding(module, layer.format, buffers)
        if scheme == FP8:
            return FP8Linear(module, buffers)
        return NVFP4Linear(module, layer.format, buffers, tuple(shape[0] for shape in shapes))

    def _layer_buffers(self, parts: list[Part], joined: bool) -> dict:
        buffers, (layer, converter, _) = {}, parts[0]
        for leaf in (layer.format.codes, "weight_scale"):
            entry = layer.leaves[leaf]
            rows = sum(part.layer.leaves[leaf].shape[0] for part in parts) if joined else 0
            buffers[leaf] = DTYPES[entry.dtype], (rows, *entry.shape[1:]) if joined else entry.shape
            if joined:
                self._copy(converter, leaf, [JoinRows(dim=0)], stacked=False)
        for leaf, (dtype, shape) in common_scalars(part.layer for part in parts).items():
            buffers[leaf] = DTYPES[dtype], (len(parts),) if joined else shape
            if joined:
                self._copy(converter, leaf, [Reshape((1,), shape), Concatenate(dim=0)], stacked=False)
        return buffers

    def _experts(self, name: str, sides: dict[str, list[Part]]) -> NVFP4Experts:
        module = self.model.get_submodule(name)
        activation = moe.activation_of(module)
        if activation is None:
            raise CheckpointError(f"{name}: NVFP4 weights are not served in {type(module).__name__}")
        first = "gate_up_proj" if module.has_gate else "up_proj"
        stored = {side: sides[side][0].layer.scheme if side in sides else DENSE for side in (first, "down_proj")}
        if set(stored.values()) != {NVFP4} or len({parts[0].layer.format for parts in sides.values()}) > 1:
            got = ", ".join(f"{side} {scheme}" for side, scheme in stored.items())
            raise CheckpointError(f"{name}: experts must be NVFP4 of one format, or dense, got {got}")
        buffers = {}
        for side in stored:
            buffers |= self._expert_buffers(name, getattr(module, side).shape, side, sides[side])
        return NVFP4Experts(activation, sides[first][0].layer.format, tuple(stored), buffers)

    def _expert_buffers(self, name: str, shape: torch.Size, side: str, parts: list[Part]) -> dict:
        (layer, converter, _), (experts, rows, columns) = parts[0], shape
        halves = 2 if side == "gate_up_proj" else 1
        operations = [repr(op) for op in converter.operations] if converter else []
        known = ["MergeModulelist(dim=0)", "Concatenate(dim=1)"][:halves]
        if len(parts) != halves * experts or operations != known:
            raise CheckpointError(f"{name}.{side} must be made of {halves * experts} NVFP4 layers, got {len(parts)}")
        for part in parts:
            if part.layer.shape != (rows // halves, columns):
                want, got = [rows // halves, columns], list(part.layer.shape)
                raise CheckpointError(f"{part.layer.name} must have shape {want}, got {got}")
        buffers = {}
        for leaf, width in ((layer.format.codes, columns // 2), ("weight_scale", columns // 16)):
            buffers[expert_buffer(side, leaf)] = DTYPES[layer.leaves[leaf].dtype], (experts, rows, width)
            self._copy(converter, leaf, list(converter.operations), stacked=True)
        for leaf, (dtype, one) in common_scalars(part.layer for part in parts).items():
            buffers[expert_buffer(side, leaf)] = DTYPES[dtype], (experts, halves) if halves > 1 else (experts, *one)
            beside = [Reshape((experts, 1), (experts, *one)), Concatenate(dim=1)] if halves > 1 else []
            self._copy(converter, leaf, [MergeModulelist(dim=0), *beside], stacked=True)
        return buffers

    def _copy(self, converter: WeightConverter, leaf: str, operations: list[ConversionOps], stacked: bool) -> None:
        """Has the tensors named ``leaf`` joined as ``converter`` joins the weights."""
        key = (*_identity(converter), leaf)
        if key in self._copies:
            return
        sources = [re.sub("weight$", leaf, source) for source in converter._original_source_patterns]
        targets = [
            expert_buffer(target, leaf) if stacked else re.sub("weight$", leaf, target)
            for target in converter._original_target_patterns
        ]
        self._copies[key] = converter.copy(sources, targets, operations=operations)

    # ------------------------------------------------------------ everything else

    def _static_scales(self) -> Iterator[tuple[str, str, torch.dtype, tuple[int, ...]]]:
        """Scales that no packed module holds: buffers of the module they are named after, so that they are saved."""
        modules = dict(self.model.named_modules())
        for layer in self.layers.values():
            name, _, attribute = self._target[layer.name].rpartition(".")
            module = self.modules.get(name) or modules.get(name)
            for leaf, entry in layer.leaves.items():
                if not STATIC.fullmatch(leaf):
                    continue
                if isinstance(module, NVFP4Experts):
                    held = expert_buffer(attribute, leaf) in module._buffers
                else:
                    held = isinstance(module, Packed) and leaf in module._buffers
                if not held and module is not None and attribute == "weight" and not hasattr(module, leaf):
                    yield name, leaf, DTYPES[entry.dtype], entry.shape

    def _check_the_rest(self) -> None:
        """Whatever else is stored in a narrow type must not end up in a dense parameter."""
        for layer in self.layers.values():
            for leaf, entry in layer.leaves.items():
                if entry.dtype in FLOATING or leaf in (layer.format.codes, "weight_scale"):
                    continue
                target, _ = self._place(f"{layer.name}.{leaf}")
                name = target.rpartition(".")[0]
                if target in self.state and self.state[target].is_floating_point() and name not in self.modules:
                    raise CheckpointError(f"{layer.name}.{leaf}: {entry.dtype} is not served in {target}")


def _identity(conversion: Any) -> tuple:
    """transformers makes its conversions anew whenever it is asked for them."""
    return conversion.scope_prefix, *conversion._original_source_patterns
