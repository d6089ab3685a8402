"""The Mamba-2 and expert layers of transformers on n3 operators: one line, and the numbers stay.

>>> from n3kernels.integrations import transformers as n3
>>> n3.enable("nemotron_h")
['nemotron_h']
>>> n3.disable()
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..mamba import compat
from ..mamba.gated_norm import gated_rms_norm
from . import transformers_moe as moe

__all__ = ["ARCHITECTURES", "disable", "enable"]

# Architecture, as transformers names its module, and the class of its gated norm.
ARCHITECTURES = {
    "nemotron_h": "NemotronHRMSNormGated",
    "mamba2": "MambaRMSNormGated",
    "bamba": "BambaRMSNormGated",
    "zamba2": "Zamba2RMSNormGated",
    "granitemoehybrid": "GraniteMoeHybridRMSNormGated",
    "falcon_h1": "FalconH1RMSNormGated",
}
# Plain norms that multiply with their weight before they round, as n3's does. (The others' round in between.)
_NORMS = {"nemotron_h": "NemotronHRMSNorm"}
_NVFP4 = f"{__package__}.transformers_nvfp4"  # it imports transformers: only when asked to
_replaced: dict[str, list[tuple[Any, str, Any]]] = {}  # architecture -> (holder, attribute, what was there)


def enable(model: str | object | None = None) -> list[str]:
    """Runs transformers' hybrid models on n3 operators: convolution, scan, state update and gated norm of their
    Mamba-2 mixers, the routers and experts of those that have them, and Nemotron-H's norms.

    It holds for every model of an architecture in this process, loaded before or after, in training and generation,
    with and without cache. Parameters, caches and outputs keep their places, dtypes and names. Besides, the experts
    implementation ``"n3"`` becomes known to transformers: ``model.set_experts_implementation("n3")`` gives it to any
    other mixture of experts. So do NVFP4 checkpoints of any architecture, with transformers 5.21 or later:
    ``from_pretrained`` then loads them packed (`transformers_nvfp4.register_quantizers`).

    Args:
        model: a model, wrapped or not, its class, or the name of an architecture (a key of ``ARCHITECTURES``); None:
            all of them.
    Returns:
        The architectures that were changed by this call.
    Raises:
        ValueError: an architecture without Mamba-2 layers. ImportError: transformers is missing or older than 5.17.

    >>> enable("mamba2"), enable("mamba2")
    (['mamba2'], [])
    >>> disable()
    """
    wanted = [*ARCHITECTURES] if model is None else [_architecture(model)]
    moe.register()
    nvfp4 = importlib.import_module(_NVFP4)
    if nvfp4.supported():
        nvfp4.register_quantizers()
    new = [name for name in wanted if name not in _replaced]
    for name in new:
        _replaced[name] = _replace(name, importlib.import_module(f"transformers.models.{name}.modeling_{name}"))
    return new


def disable() -> None:
    """Gives every architecture its own functions back, and no longer loads NVFP4 checkpoints."""
    if _NVFP4 in sys.modules:
        sys.modules[_NVFP4].unregister_quantizers()
    for changes in _replaced.values():
        for holder, attribute, original in changes:
            setattr(holder, attribute, original)
    _replaced.clear()


def _architecture(model: str | object) -> str:
    if isinstance(model, str):
        names = [model]
    else:  # subclasses of transformers' models, and models in wrappers: adapters, torch.compile
        kinds = [model] if isinstance(model, type) else map(type, getattr(model, "modules", lambda: [model])())
        names = [base.__module__.rpartition(".modeling_")[2] for kind in kinds for base in kind.__mro__]
    name = next((name for name in names if name in ARCHITECTURES), names[0])
    if name not in ARCHITECTURES:
        raise ValueError(f"no Mamba-2 layers of transformers in {name!r}; there are {', '.join(ARCHITECTURES)}")
    return name


def _replace(name: str, module: ModuleType) -> list[tuple[Any, str, Any]]:
    norm = getattr(module, ARCHITECTURES[name])
    changes = [(module, attribute, function) for attribute, function in _FUNCTIONS.items()]
    changes.append((norm, "forward", _gated_norm))
    if name in _NORMS:
        changes.append((getattr(module, _NORMS[name]), "forward", _norm))
    if name in moe.EXPERTS:
        router, forward = moe.ROUTERS[name]
        changes.append((getattr(module, router), "forward", forward))
        changes.append((getattr(module, moe.EXPERTS[name]), "forward", moe.experts_forward))
    missing = [attribute for holder, attribute, _ in changes if not hasattr(holder, attribute)]
    if missing:
        raise ImportError(f"transformers >= 5.17 is needed: {module.__name__} has no {', '.join(missing)}")
    originals = [(holder, attribute, getattr(holder, attribute)) for holder, attribute, _ in changes]
    for holder, attribute, function in changes:
        setattr(holder, attribute, function)
    return originals


# ---------------------------------------------------------------- what the mixers call


def _conv(hidden_states, weight, bias=None, activation=None, seq_idx=None, **_):
    return compat.causal_conv1d_fn(hidden_states, weight, bias, seq_idx, activation=activation)


def _conv_update(hidden_states, conv_state, weight, bias=None, activation=None, **_):
    return compat.causal_conv1d_update(hidden_states, conv_state, weight, bias, activation)


def _scan(hidden_states, dt, A, B, C, chunk_size, D=None, dt_bias=None, initial_states=None, dt_softplus=False,
          dt_limit=(0.0, float("inf")), return_final_states=False, z=None, seq_idx=None, **_):  # fmt: skip
    return compat.mamba_chunk_scan_combined(
        hidden_states, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx,
        dt_softplus=dt_softplus, dt_limit=dt_limit, return_final_states=return_final_states,
    )  # fmt: skip


def _update(state, hidden_states, dt, A, B, C, D=None, dt_bias=None, dt_softplus=False, z=None, **_):
    return compat.selective_state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)


def _split_conv1d_scan(
    zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None,
    dt_limit=(0.0, float("inf")), return_final_states=False, activation="silu", rmsnorm_weight=None,
    rmsnorm_eps=1e-6, outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True,
    seq_idx=None, **_,
):  # fmt: skip
    return compat.mamba_split_conv1d_scan_combined(
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states, seq_idx, dt_limit,
        return_final_states, activation, rmsnorm_weight, rmsnorm_eps, outproj_weight, outproj_bias, headdim, ngroups,
        norm_before_gate,
    )  # fmt: skip


def _gated_norm(self: torch.nn.Module, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
    if hasattr(self, "group_size"):
        group_size, norm_before_gate = self.group_size, False
    else:  # Falcon-H1
        group_size, norm_before_gate = hidden_states.shape[-1] // self.n_groups, self.norm_before_gate
    gate = None if gate is None else gate.to(hidden_states.dtype)
    return gated_rms_norm(hidden_states, gate, self.weight, group_size, self.variance_epsilon, norm_before_gate)


def _norm(self: torch.nn.Module, hidden_states: Tensor) -> Tensor:
    return gated_rms_norm(hidden_states, None, self.weight, hidden_states.shape[-1], self.variance_epsilon)


_FUNCTIONS = {
    "causal_conv1d_fn": _conv,
    "causal_conv1d_update": _conv_update,
    "mamba2_chunk_scan": _scan,
    "mamba2_selective_state_update": _update,
    "mamba2_split_conv1d_scan_combined": _split_conv1d_scan,
}
