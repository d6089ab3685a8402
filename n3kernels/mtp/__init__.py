"""Multi-token prediction: drawing drafts, sampling, verification, commits, thinking budgets."""

from .commit import commit
from .draft_sample import draft_sample
from .sample import sample
from .thinking_budget import ThinkingBudget, thinking_budget
from .verify import verify
from .verify_tree import verify_tree

__all__ = ["ThinkingBudget", "commit", "draft_sample", "sample", "thinking_budget", "verify", "verify_tree"]
