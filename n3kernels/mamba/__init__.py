"""Mamba-2: everything between ``in_proj`` and ``out_proj`` of the mixer."""

from .gated_norm import gated_rms_norm

__all__ = ["gated_rms_norm"]
