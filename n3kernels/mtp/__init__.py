"""Multi-token prediction: sampling, verification of drafts, thinking budgets."""

from .sample import sample
from .thinking_budget import ThinkingBudget, thinking_budget
from .verify import verify

__all__ = ["ThinkingBudget", "sample", "thinking_budget", "verify"]
