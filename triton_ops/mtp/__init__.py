"""Triton versions of the mtp operators."""
