"""Gradients: what an operator does at the Autograd key, and backward operators by recomputation through a reference,
the definition of every ``n3::<op>_bwd``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["autograd_kernel", "grads_through"]


def autograd_kernel(
    op: torch._ops.OpOverload, signature: inspect.Signature, setup_context: Callable | None, backward: Callable | None
) -> Callable[..., Any]:
    """The kernel of ``op`` at the Autograd key: the formula of ``setup_context`` and ``backward``, which are those of
    `torch.library.register_autograd`; without one, for operators that are themselves a backward, a refusal.

    Torch alone would give the latter gradients of None, with a warning, and drop the tangents of forward-mode
    derivatives without one. Here both raise: the first in the backward pass, so that a call whose gradient nobody wants
    needs no ``no_grad``.
    """
    name = op._schema.name
    keywords = any(p.kind == p.KEYWORD_ONLY for p in signature.parameters.values())

    def below(keys, args, kwargs):
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args, **kwargs)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            *args, kwargs, keys = args
            out = below(keys, args, kwargs)
            if setup_context is not None:
                more = {"keyword_only_inputs": kwargs} if keywords else {}
                setup_context(ctx, inputs=tuple(args), output=out, **more)
            return out

        @staticmethod
        def backward(ctx, *grads):
            if backward is None:
                raise RuntimeError(f"{name}: has no gradient: n3's operators are differentiable once")
            return *backward(ctx, *grads), None, None

    def kernel(keys, *args, **kwargs):
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, (*args, *kwargs.values()))
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args, **kwargs)):
            return below(keys, args, kwargs)
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(f"{name}: torch.func has no gradient of it: use torch.autograd.grad")
        bound = signature.bind(*args, **kwargs)  # torch leaves out what has its default
        bound.apply_defaults()
        return Node.apply(*bound.args, bound.kwargs, keys)

    return kernel


def _refuse_tangents(name: str, values: Sequence[Any]) -> None:
    if any(isinstance(v, Tensor) and forward_ad.unpack_dual(v).tangent is not None for v in values):
        raise RuntimeError(f"{name}: has no forward-mode derivative: use reverse mode")


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
