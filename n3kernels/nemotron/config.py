"""The fields of a Nemotron 3 ``config.json`` that a forward pass needs, checked."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

__all__ = ["CheckpointError", "Config"]

MAMBA, MOE, ATTENTION, MLP = "mamba", "moe", "attention", "mlp"
_LETTERS = {"M": MAMBA, "E": MOE, "*": ATTENTION, "-": MLP}
_NAMES = {**{kind: kind for kind in _LETTERS.values()}, "linear_attention": MAMBA, "full_attention": ATTENTION}


class CheckpointError(ValueError):
    """A configuration or checkpoint that cannot be read; the message is one line that names file and key."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of one model, under the names of Hugging Face's ``nemotron_h`` configuration.

    ``layers`` and ``mtp_layers`` hold one of "mamba", "moe", "attention", "mlp" per layer; they are read from
    ``layers_block_type`` or, as older files have it, from ``hybrid_override_pattern`` (M, E, *, -).
    """

    layers: tuple[str, ...]
    vocab_size: int
    hidden_size: int
    num_attention_heads: int = 32
    num_key_value_heads: int = 2
    head_dim: int = 128
    intermediate_size: int = 0
    mamba_num_heads: int = 64
    mamba_head_dim: int = 64
    ssm_state_size: int = 128
    n_groups: int = 8
    conv_kernel: int = 4
    chunk_size: int = 128
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    moe_latent_size: int | None = None
    routed_scaling_factor: float = 1.0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    layer_norm_epsilon: float = 1e-5
    num_nextn_predict_layers: int = 0
    mtp_layers: tuple[str, ...] = ()
    bos_token_id: int = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int = 0

    @property
    def d_inner(self) -> int:
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        return self.d_inner + 2 * self.n_groups * self.ssm_state_size

    @classmethod
    def read(cls, path: str | Path) -> Config:
        """Reads ``config.json`` (or the folder that holds one). Raises `CheckpointError`."""
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise CheckpointError(f"{path}: no such file") from None
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path}: not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise CheckpointError(f"{path}: must hold a JSON object, got {type(raw).__name__}")
        try:
            return cls.from_dict(raw)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Config:
        """Takes the dictionary of a ``config.json``. Keys of no meaning to the forward pass are ignored."""
        if raw.get("model_type", "nemotron_h") != "nemotron_h":
            raise CheckpointError(f"model_type must be nemotron_h, got {raw['model_type']}")
        values: dict[str, Any] = {"layers": _layers(raw, "layers_block_type", "hybrid_override_pattern")}
        if not values["layers"]:
            raise CheckpointError("layers_block_type or hybrid_override_pattern must name at least one layer")
        if raw.get("num_nextn_predict_layers"):
            values["mtp_layers"] = _layers(raw, "mtp_layers_block_type", "mtp_hybrid_override_pattern") or (
                ATTENTION,
                MOE,
            )
        for field in dataclasses.fields(cls):
            if field.name in raw:
                values[field.name] = _typed(field, raw[field.name])
        eos = raw.get("eos_token_id", 2)
        values["eos_token_ids"] = tuple(eos) if isinstance(eos, list) else (eos,)
        if not all(type(token) is int for token in values["eos_token_ids"]):
            raise CheckpointError(f"eos_token_id must be an int or a list of them, got {eos!r}")
        for name in ("vocab_size", "hidden_size"):
            if name not in values:
                raise CheckpointError(f"{name} is missing")
        config = cls(**values)
        config.check()
        return config

    def check(self) -> None:
        """Raises `CheckpointError` where sizes are missing or contradict each other."""
        used = set(self.layers) | set(self.mtp_layers)
        if MAMBA in self.mtp_layers:
            raise CheckpointError("mtp_layers_block_type must hold no mamba layer: drafts could not be taken back")
        need = ["vocab_size", "hidden_size"]
        need += ["num_attention_heads", "num_key_value_heads", "head_dim"] * (ATTENTION in used)
        need += ["mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel"] * (MAMBA in used)
        need += ["chunk_size"] * (MAMBA in used) + ["intermediate_size"] * (MLP in used)
        need += ["n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"] * (MOE in used)
        need += ["moe_shared_expert_intermediate_size", "n_group", "topk_group"] * (MOE in used)
        for name in need:
            if getattr(self, name) <= 0:
                raise CheckpointError(f"{name} must be positive, got {getattr(self, name)}")
        for kind, whole, part in (
            (MAMBA, "mamba_num_heads", "n_groups"),
            (ATTENTION, "num_attention_heads", "num_key_value_heads"),
            (MOE, "n_routed_experts", "n_group"),
        ):
            count, size = getattr(self, whole), getattr(self, part)
            if kind in used and count % size:
                raise CheckpointError(f"{part} must divide {whole} ({count}), got {size}")
        if MOE in used:
            self._check_routing()
        for token in self.eos_token_ids:
            if not 0 <= token < self.vocab_size:
                raise CheckpointError(f"eos_token_id must be in [0, {self.vocab_size}), got {token}")

    def _check_routing(self) -> None:
        if self.moe_latent_size is not None and self.moe_latent_size < 0:
            raise CheckpointError(f"moe_latent_size must not be negative, got {self.moe_latent_size}")
        if self.topk_group > self.n_group:
            raise CheckpointError(f"topk_group must be at most n_group ({self.n_group}), got {self.topk_group}")
        eligible = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > eligible:
            rule = f"num_experts_per_tok must be at most the {eligible} experts of topk_group groups"
            raise CheckpointError(f"{rule}, got {self.num_experts_per_tok}")

    def to_dict(self) -> dict[str, Any]:
        """A ``config.json`` that Hugging Face's ``nemotron_h`` reads too."""
        raw = dataclasses.asdict(self)
        hugging = {MAMBA: "linear_attention", ATTENTION: "full_attention"}
        raw["layers_block_type"] = [hugging.get(kind, kind) for kind in raw.pop("layers")]
        raw["mtp_layers_block_type"] = [hugging.get(kind, kind) for kind in raw.pop("mtp_layers")]
        raw["eos_token_id"] = list(raw.pop("eos_token_ids"))
        return {"model_type": "nemotron_h", "architectures": ["NemotronHForCausalLM"], **raw}


def _layers(raw: dict[str, Any], names: str, pattern: str) -> tuple[str, ...]:
    if raw.get(names):
        kinds, table, key = raw[names], _NAMES, names
    else:
        kinds, table, key = raw.get(pattern) or "", _LETTERS, pattern
    if not isinstance(kinds, list if table is _NAMES else str):
        raise CheckpointError(f"{key} must be a {'list' if table is _NAMES else 'string'}, got {kinds!r}")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in table:
            raise CheckpointError(f"{key} must hold {', '.join(table)}, got {kind!r}")
    return tuple(table[kind] for kind in kinds)


def _typed(field: dataclasses.Field, value: Any) -> Any:
    kind = str(field.type)
    if value is None and "None" in kind:
        return None
    if kind.startswith("int") and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "float" and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind == "bool" and isinstance(value, bool):
        return value
    raise CheckpointError(f"{field.name} must be of type {kind.split(' ')[0]}, got {value!r}")
