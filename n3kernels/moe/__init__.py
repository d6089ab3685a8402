"""Mixture of experts: routing, sorting, grouped experts, and the LatentMoE layer of Nemotron 3."""

from .experts import experts
from .latent_moe import latent_moe
from .route import route
from .sort import sort

__all__ = ["experts", "latent_moe", "route", "sort"]
