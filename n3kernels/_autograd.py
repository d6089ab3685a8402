"""Backward operators by recomputation through a reference: the definition of every ``n3::<op>_bwd``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["grads_through"]


def grads_through(
    fn: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    grad_outputs: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """d(fn)/d(inputs) applied to ``grad_outputs``; an absent input gets an empty gradient, as a schema has no ``None``.

    An operator's kernel runs below autograd: the dispatcher has excluded those keys for the thread. They are let in
    again for the recomputation, and no others: without the exclusion of the autocast keys, matrix products would be
    done in bfloat16.
    """
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        exclude = exclude.remove(key)
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        leaves = [t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]
        out = fn(*leaves)
        outs = (out,) if isinstance(out, Tensor) else tuple(out)
        pairs = [(o, g) for o, g in zip(outs, grad_outputs, strict=True) if g is not None and o.requires_grad]
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        got = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
    grads = []
    for leaf, original in zip(leaves, inputs, strict=True):
        grad: Any = next(got) if leaf is not None and leaf.requires_grad else None
        if grad is None:
            like = next(t for t in inputs if t is not None)
            grad = like.new_zeros(0) if original is None else torch.zeros_like(original).contiguous()
        grads.append(grad)
    return tuple(grads)
