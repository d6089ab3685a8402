"""Which tensors of a dense checkpoint `n3kernels quantize` packs, which it keeps, and which share a global scale."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from ._safetensors import Entry
from .nemotron.config import ATTENTION, MAMBA, CheckpointError, Config

__all__ = ["RECIPES", "choose", "collapse", "fused"]

RECIPES = {"nvfp4": False, "nvfp4-4over6": True}  # name -> whether a block's scale maps its amax to 6 or to 4

# What ModelOpt's recipes never quantise, and what is no linear layer though its weight is a matrix.
_ALWAYS = (
    "*embed*", "*wte", "*wpe", "*norm*", "*conv1d*", "*router*", "*.gate", "*_gate", "lm_head", "*.lm_head", "*score",
    "*classifier*", "*vision*", "*visual*", "*audio*", "mtp.*", "*.mtp.*",
)  # fmt: skip
# Nemotron 3: attention and the latent projections stay bf16 in every published checkpoint (docs/checkpoints.md).
_NEMOTRON = ("*.mixer.[qkvo]_proj", "*_latent_proj")
_MAMBA_PROJ = re.compile(r"(?:^|\.)layers\.(\d+)\.mixer\.(?:in|out)_proj$")

# Layers that serving engines fuse into one, and for which they want one global scale.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("q_a_proj", "kv_a_proj_with_mqa"))


def choose(
    tensors: Mapping[str, Entry], config: Mapping[str, Any], exclude: Iterable[str]
) -> dict[str, str | None]:
    """For every tensor None if it is to be packed, else why not.

    Args:
        tensors: of the whole checkpoint.
        config: its ``config.json``.
        exclude: further patterns (``*``, ``?``, ``[...]``) of layers to keep; a pattern has to match one.
    """
    patterns = [*_ALWAYS, *(_NEMOTRON if config.get("model_type") == "nemotron_h" else ())]
    before_attention = _before_attention(config)
    unused = set(exclude)
    reasons: dict[str, str | None] = {}
    for name, entry in tensors.items():
        layer, _, leaf = name.rpartition(".")
        reason = None
        by_user = {pattern for pattern in exclude if fnmatchcase(layer, pattern) or fnmatchcase(name, pattern)}
        unused -= by_user
        if len(entry.shape) == 3 and leaf.endswith("_proj"):
            reason = "experts in one tensor: save the checkpoint with one tensor per expert"
        elif leaf != "weight" or len(entry.shape) != 2:
            reason = "no linear weight"
        elif entry.dtype not in ("F32", "F16", "BF16"):
            reason = f"stored as {entry.dtype}"
        elif by_user:
            reason = "excluded"
        elif any(fnmatchcase(layer, pattern) for pattern in patterns):
            reason = "kept by the recipe"
        elif (found := _MAMBA_PROJ.search(layer)) and int(found[1]) in before_attention:
            reason = "Mamba before attention"
        elif entry.shape[1] % 16 or not entry.size:
            reason = f"K = {entry.shape[1]} is no multiple of 16"
        reasons[name] = reason
    for pattern in sorted(unused)[:1]:
        raise CheckpointError(f"--exclude {pattern} matches no layer")
    return reasons


def _before_attention(config: Mapping[str, Any]) -> set[int]:
    if config.get("model_type") != "nemotron_h":
        return set()
    layers = Config.from_dict(dict(config)).layers
    return {i for i, pair in enumerate(zip(layers, layers[1:], strict=False)) if pair == (MAMBA, ATTENTION)}


def fused(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """For every weight the weights it shares a global scale with, itself included, in one order for all of them."""
    names = list(names)
    present, groups = set(names), {}
    for name in names:
        parent, _, layer = name.removesuffix(".weight").rpartition(".")
        groups[name] = (name,)
        for leaves in _FUSED:
            if layer in leaves:
                members = (f"{parent}.{leaf}.weight" if parent else f"{leaf}.weight" for leaf in leaves)
                groups[name] = tuple(member for member in members if member in present)
    return groups


def collapse(kept: Iterable[str], packed: Iterable[str]) -> list[str]:
    """The layers ``kept``, with ``*`` for numbers wherever that matches none of the layers ``packed``."""
    families = defaultdict(list)
    for layer in kept:
        families[re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer)].append(layer)
    # Two layers of one family differ in numbers alone: the families of the packed layers tell all that can match.
    others = {re.sub(r"(?<=\.)\d+(?=\.|$)", "0", layer) for layer in packed}
    out: list[str] = []
    for family, layers in families.items():
        free = not any(fnmatchcase(layer, family) for layer in others)
        out += [family] if free and len(layers) > 1 else layers
    return sorted(out)
