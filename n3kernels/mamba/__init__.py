"""Mamba-2: everything between ``in_proj`` and ``out_proj`` of the mixer."""

from .conv1d import causal_conv1d, causal_conv1d_slots
from .conv1d_update import causal_conv1d_update
from .gated_norm import gated_rms_norm
from .mamba2_decode import mamba2_decode
from .mamba2_prefill import mamba2_prefill
from .ssd_scan import ssd_scan, ssd_scan_slots
from .ssm_replay import ssm_replay_commit, ssm_replay_flush, ssm_replay_update
from .ssm_update import ssm_update

__all__ = [
    "causal_conv1d",
    "causal_conv1d_slots",
    "causal_conv1d_update",
    "gated_rms_norm",
    "mamba2_decode",
    "mamba2_prefill",
    "ssd_scan",
    "ssd_scan_slots",
    "ssm_replay_commit",
    "ssm_replay_flush",
    "ssm_replay_update",
    "ssm_update",
]
