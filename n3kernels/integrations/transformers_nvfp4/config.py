"""What a checkpoint's ``quantization_config`` (or ``hf_quant_config.json``) says of its layers, in either format.

Sources: modelopt/torch/export/convert_hf_config.py of NVIDIA/Model-Optimizer for both of ModelOpt's shapes;
compressed_tensors/utils/match.py of vllm-project/compressed-tensors for targets and ignore lists.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NoReturn

from ...nemotron.config import CheckpointError

__all__ = ["DENSE", "FP8", "NVFP4", "check", "flatten", "has_nvfp4", "scheme"]

NVFP4, FP8, DENSE = "NVFP4", "FP8", "dense"
_ALGOS = {"NVFP4": NVFP4, "W4A16_NVFP4": NVFP4, "FP8": FP8}
_MIXED = "MIXED_PRECISION"


def flatten(raw: Mapping[str, Any]) -> dict[str, Any]:
    """ModelOpt's ``hf_quant_config.json`` in the shape of ``config.json``; that shape as it is."""
    if "quantization" not in raw:
        return dict(raw)
    inner = raw["quantization"]
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"hf_quant_config.json: quantization must be an object, got {inner!r}")
    flat = {key: value for key, value in inner.items() if key != "exclude_modules"}
    flat["ignore"] = inner.get("exclude_modules") or []
    if "producer" in raw:
        flat["producer"] = raw["producer"]
    return {**flat, "quant_method": "modelopt"}


def has_nvfp4(raw: Mapping[str, Any]) -> bool:
    """Whether a compressed-tensors configuration has NVFP4 layers at all."""
    groups = raw.get("config_groups") or {}
    return isinstance(groups, Mapping) and any(
        isinstance(group, Mapping) and _is_float(group, 4) and "nvfp4" in str(group.get("format") or raw.get("format"))
        for group in groups.values()
    )


def check(raw: Mapping[str, Any]) -> None:
    """Raises `CheckpointError` where ``raw`` is neither format, or has layers that are not served."""
    method = raw.get("quant_method")
    if method == "modelopt":
        _check_modelopt(raw)
    elif method == "compressed-tensors":
        groups = raw.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            _fail(f"config_groups must be an object with at least one group, got {groups!r}")
        for name, group in groups.items():
            if not isinstance(group, Mapping) or not _strings(group.get("targets")):
                _fail(f"config_groups.{name} must have a list of targets")
            _group_scheme(name, group)
    else:
        _fail(f"quant_method must be modelopt or compressed-tensors, got {method!r}")
    if not _strings(_ignored(raw)):
        _fail(f"ignore must be a list of strings, got {_ignored(raw)!r}")
    if method == "compressed-tensors":
        _check_patterns(raw)


def _check_modelopt(raw: Mapping[str, Any]) -> None:
    algo = raw.get("quant_algo")
    if algo != _MIXED:
        if algo not in _ALGOS:
            _fail(f"quant_algo must be one of {', '.join((*_ALGOS, _MIXED))}, got {algo!r}")
        _layer_scheme("", raw)
        return
    layers = raw.get("quantized_layers")
    if not isinstance(layers, Mapping) or not all(isinstance(value, Mapping) for value in layers.values()):
        _fail(f"quantized_layers must name every layer's quant_algo where quant_algo is {_MIXED}")
    for name, value in layers.items():
        _layer_scheme(f"quantized_layers.{name}.", value)


def scheme(raw: Mapping[str, Any], layer: str) -> str:
    """What a checked ``raw`` says of the linear layer that the checkpoint calls ``layer``: `NVFP4`, `FP8`, `DENSE`, or
    another algorithm's name."""
    if raw["quant_method"] == "compressed-tensors":
        if any(_matches(layer, pattern) for pattern in _ignored(raw)):
            return DENSE
        for name, group in raw["config_groups"].items():
            if any(target == "Linear" or _matches(layer, target) for target in group["targets"]):
                return _group_scheme(name, group)
        return DENSE
    if raw["quant_algo"] == _MIXED:
        for name in (layer, *_parents(layer)):
            if name in raw["quantized_layers"]:
                return _layer_scheme(name, raw["quantized_layers"][name])
        return DENSE
    names = (layer, *_parents(layer))
    ignored = any(fnmatchcase(name, pattern) for pattern in _ignored(raw) for name in names)
    return DENSE if ignored else _layer_scheme("", raw)


def _ignored(raw: Mapping[str, Any]) -> Any:
    return raw.get("ignore") or raw.get("exclude_modules") or []


def _parents(layer: str) -> list[str]:
    parts = layer.split(".")
    return [".".join(parts[:i]) for i in range(len(parts) - 1, 0, -1)]


def _layer_scheme(where: str, value: Mapping[str, Any]) -> str:
    algo, group_size = value.get("quant_algo"), value.get("group_size") or 16
    if _ALGOS.get(algo) == NVFP4 and group_size != 16:
        _fail(f"{where}group_size must be 16 for NVFP4, got {group_size!r}")
    return _ALGOS.get(algo, str(algo))


def _group_scheme(name: str, group: Mapping[str, Any]) -> str:
    weights = group.get("weights")
    if not weights:
        return DENSE
    if _is_float(group, 4):
        if weights.get("group_size") != 16:
            _fail(f"config_groups.{name}.weights.group_size must be 16 for NVFP4, got {weights.get('group_size')!r}")
        return NVFP4
    if _is_float(group, 8) and (weights.get("strategy") or "tensor") == "tensor":
        return FP8
    got = ", ".join(f"{key} {weights.get(key)!r}" for key in ("num_bits", "type", "strategy"))
    _fail(f"config_groups.{name}.weights must be NVFP4 or FP8 with one scale per tensor, got {got}")


def _is_float(group: Mapping[str, Any], bits: int) -> bool:
    weights = group.get("weights")
    return isinstance(weights, Mapping) and weights.get("type") == "float" and weights.get("num_bits") == bits


def _matches(layer: str, pattern: str) -> bool:
    return re.match(pattern[3:], layer) is not None if pattern.startswith("re:") else pattern == layer


def _check_patterns(raw: Mapping[str, Any]) -> None:
    targets = [target for group in raw["config_groups"].values() for target in group["targets"]]
    for pattern in (*_ignored(raw), *targets):
        try:
            _matches("", pattern)
        except re.error as error:
            _fail(f"{pattern!r} is no regular expression: {error}")


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _fail(message: str) -> NoReturn:
    raise CheckpointError(f"quantization_config: {message}")
