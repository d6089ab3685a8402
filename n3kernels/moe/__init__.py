"""Mixture of experts: routing, sorting, grouped experts, and the LatentMoE layer of Nemotron 3."""

from ..distributed import ExpertParallel
from .experts import experts
from .grouped_linear import grouped_linear
from .latent_moe import latent_moe
from .latent_moe_parts import latent_moe_front, latent_moe_tail
from .route import route
from .sort import sort
from .upcycle import Upcycled, upcycle

__all__ = [
    "ExpertParallel", "Upcycled", "experts", "grouped_linear", "latent_moe", "latent_moe_front", "latent_moe_tail",
    "route", "sort", "upcycle",
]  # fmt: skip
