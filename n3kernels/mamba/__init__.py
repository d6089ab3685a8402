"""Mamba-2: everything between ``in_proj`` and ``out_proj`` of the mixer.

The operators, for engines: states by slot. And under their own names and signatures the functions of mamba_ssm and
causal_conv1d, for code that was written for those.
"""

from .compat import (
    causal_conv1d_fn,
    causal_conv1d_update,
    causal_conv1d_varlen_states,
    layernorm_fn,
    mamba_chunk_scan_combined,
    mamba_split_conv1d_scan_combined,
    rmsnorm_fn,
    selective_state_update,
)
from .conv1d import causal_conv1d, causal_conv1d_slots
from .conv1d_update import causal_conv1d_update_slots
from .gated_norm import gated_rms_norm
from .mamba2_decode import mamba2_decode
from .mamba2_prefill import mamba2_prefill
from .ssd_scan import ssd_scan, ssd_scan_slots
from .ssm_replay import ssm_replay_commit, ssm_replay_flush, ssm_replay_update
from .ssm_update import ssm_update

__all__ = [
    "causal_conv1d",
    "causal_conv1d_fn",
    "causal_conv1d_slots",
    "causal_conv1d_update",
    "causal_conv1d_update_slots",
    "causal_conv1d_varlen_states",
    "gated_rms_norm",
    "layernorm_fn",
    "mamba2_decode",
    "mamba2_prefill",
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "rmsnorm_fn",
    "selective_state_update",
    "ssd_scan",
    "ssd_scan_slots",
    "ssm_replay_commit",
    "ssm_replay_flush",
    "ssm_replay_update",
    "ssm_update",
]
