"""Operators over several processes with ``torch.distributed``: `ExpertParallel`."""

from .expert_parallel import ExpertParallel
from .plan import Traffic, plan_traffic

__all__ = ["ExpertParallel", "Traffic", "plan_traffic"]
