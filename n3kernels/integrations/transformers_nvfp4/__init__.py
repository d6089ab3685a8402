"""NVFP4 checkpoints in transformers: ModelOpt's and compressed-tensors', by `from_pretrained` as any other.

`register_quantizers`, which `transformers.enable` calls too, makes the formats known to transformers. Linear layers,
embeddings and experts that a checkpoint stores as NVFP4 stay packed and run on n3 operators; linear layers in FP8 with
one scale per tensor stay FP8. Everything else is loaded as ever.

>>> from n3kernels.integrations import transformers_nvfp4
>>> transformers_nvfp4.register_quantizers()
['modelopt', 'compressed-tensors', 'hf_quant_config.json']
>>> transformers_nvfp4.unregister_quantizers()
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import __version__ as transformers_version
from transformers.configuration_utils import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file, logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from ...nemotron.config import CheckpointError
from .config import DENSE, FP8, NVFP4, check, flatten, has_nvfp4, scheme
from .layers import Packed
from .plan import Plan
from .stored import STATIC, read_layers

__all__ = ["NVFP4CheckpointConfig", "NVFP4CheckpointQuantizer", "register_quantizers", "unregister_quantizers"]

logger = logging.get_logger(__name__)
HF_QUANT_CONFIG = "hf_quant_config.json"


class NVFP4CheckpointConfig(QuantizationConfigMixin):
    """A checkpoint's ``quantization_config``, checked and kept as it is for saving.

    Args:
        repair: set NaN block scales of all-zero blocks to 0 instead of refusing them. It is asked for in the
            configuration: ``config.quantization_config["repair"] = True`` before ``from_pretrained(config=config)``.
        raw: the keys of ``config.json``.
    """

    def __init__(self, repair: bool = False, **raw: Any):
        raw = flatten(raw)
        check(raw)
        self.quant_method, self.repair, self.raw = raw["quant_method"], bool(repair), raw

    def to_dict(self) -> dict[str, Any]:
        return dict(self.raw)


class NVFP4CheckpointQuantizer(HfQuantizer):
    """Loads what is packed as it is packed; see the module's documentation."""

    requires_calibration = True  # a dense checkpoint is not quantised on the way: `n3kernels quantize` does that

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.bfloat16 if dtype.itemsize == 1 else dtype  # of "auto", read off a quantised tensor

    def update_parallel_plan(self, model, plan) -> None:
        parallel = getattr(model.config, "distributed_config", None)
        if (getattr(parallel, "tp_size", None) or 1) > 1:
            raise NotImplementedError("packed NVFP4 weights cannot be split over devices; load without tp_plan")

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs) -> None:
        layers = read_layers(checkpoint_files)
        self.plan = Plan(model, layers, get_model_conversion_mapping(model))
        self._compare(model)
        self.plan.apply()
        ignored = model._keys_to_ignore_on_load_unexpected or set()
        model._keys_to_ignore_on_load_unexpected = {*ignored, rf"\.{STATIC.pattern}$"}

    def _compare(self, model) -> None:
        """What the configuration says of the layers, against what is stored."""
        raw, other = self.quantization_config.raw, []
        for target, parts in self.plan.parts.items():
            linear = isinstance(model.get_submodule(target.rpartition(".")[0]), (nn.Linear, Packed))
            for layer in (part.layer for part in parts if linear):
                said = scheme(raw, layer.name)
                if said not in (NVFP4, FP8, DENSE) and layer.scheme != DENSE:
                    raise CheckpointError(f"{layer.name}: quant_algo {said} is not served")
                if said != layer.scheme:
                    other.append(f"{layer.name}, which it says is {said} and which is stored as {layer.scheme}")
        if other:
            more = f" and of {len(other) - 1} more" if len(other) > 1 else ""
            logger.warning(f"quantization_config is wrong of {other[0]}{more}. The stored tensors are taken.")
        static = sum(bool(STATIC.fullmatch(leaf)) for layer in self.plan.layers.values() for leaf in layer.leaves)
        if static:
            logger.info(
                f"{static} static scales of activations and of the KV cache are not used where weights are NVFP4: "
                f"activations stay as they are, keys and values are cached in the model's dtype."
            )

    def update_weight_conversions(self, weight_conversions, model=None):
        return self.plan.joined(weight_conversions)

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name in self.plan.modules:
            module: Packed = model.get_submodule(name)
            if any(buffer.is_meta for buffer in module.buffers()):
                raise CheckpointError(f"{name} is not in memory: packed layers cannot be offloaded")
            module.finish(name, self.quantization_config.repair)
        del self.plan
        return model

    def is_serializable(self, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


# ---------------------------------------------------------------- registration

_undo: list[Callable[[], None]] = []


def supported() -> bool:
    """Whether this transformers lets a quantizer say how its tensors are joined: 5.21 and later do."""
    return hasattr(WeightConverter, "copy")


def register_quantizers() -> list[str]:
    """Makes transformers load NVFP4 checkpoints, whose ``quant_method`` is ``modelopt`` or ``compressed-tensors``.

    transformers has no ``modelopt``. Of ``compressed-tensors`` it keeps every checkpoint without NVFP4 layers. A
    ModelOpt checkpoint that has its configuration in ``hf_quant_config.json`` alone is recognised too, by
    `PreTrainedConfig.get_config_dict`.

    Returns:
        What this call made known; calling it again makes nothing known.
    Raises:
        ImportError: transformers is older than 5.21.
    """
    if not supported():
        raise ImportError(f"transformers >= 5.21 is needed for NVFP4 checkpoints, got {transformers_version}")
    if _undo:
        return []
    auto.register_quantization_config("modelopt")(NVFP4CheckpointConfig)
    auto.register_quantizer("modelopt")(NVFP4CheckpointQuantizer)
    _undo.append(lambda: auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop("modelopt"))
    _undo.append(lambda: auto.AUTO_QUANTIZER_MAPPING.pop("modelopt"))
    _share(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, _CompressedTensorsConfig)
    _share(auto.AUTO_QUANTIZER_MAPPING, _compressed_tensors_quantizer)
    original = PreTrainedConfig.__dict__["get_config_dict"]
    PreTrainedConfig.get_config_dict = classmethod(_with_hf_quant_config(original.__func__))
    _undo.append(lambda: setattr(PreTrainedConfig, "get_config_dict", original))
    return ["modelopt", "compressed-tensors", HF_QUANT_CONFIG]


def unregister_quantizers() -> None:
    """Takes back what `register_quantizers` did; models that are loaded stay what they are."""
    while _undo:
        _undo.pop()()


def _share(mapping: dict, ours: Any) -> None:
    """``register_quantizer`` refuses names that are taken, and transformers' own class is to keep its checkpoints."""
    theirs = mapping["compressed-tensors"]
    _their[ours] = theirs
    mapping["compressed-tensors"] = ours
    _undo.append(lambda: mapping.__setitem__("compressed-tensors", theirs))


_their: dict[Any, Any] = {}


class _CompressedTensorsConfig:
    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs):
        if has_nvfp4(config_dict):
            return NVFP4CheckpointConfig.from_dict(config_dict, **kwargs)
        return _their[_CompressedTensorsConfig].from_dict(config_dict, **kwargs)


def _compressed_tensors_quantizer(quantization_config, **kwargs):
    ours = isinstance(quantization_config, NVFP4CheckpointConfig)
    return (NVFP4CheckpointQuantizer if ours else _their[_compressed_tensors_quantizer])(quantization_config, **kwargs)


def _with_hf_quant_config(original: Callable) -> Callable:
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        config, unused = original(cls, pretrained_model_name_or_path, **kwargs)
        if config and "quantization_config" not in config:
            raw = _read_hf_quant_config(pretrained_model_name_or_path, kwargs)
            if raw is not None:
                config["quantization_config"] = raw
        return config, unused

    return get_config_dict


def _read_hf_quant_config(source: str | Path, kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    keys = ("cache_dir", "token", "revision", "local_files_only", "subfolder")
    where = {key: kwargs[key] for key in keys if key in kwargs}
    path = cached_file(
        source, HF_QUANT_CONFIG, _raise_exceptions_for_gated_repo=False, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, **where,
    )  # fmt: skip
    if path is None:
        return None
    try:
        raw = json.loads(Path(path).read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, got {type(raw).__name__}")
    return flatten(raw)
