"""Training with NVFP4 products: all three matrix products of a linear layer have both operands in 4 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .gemm import gemm
from .tensor import NVFP4Tensor

__all__ = ["Recipe", "TrainingLinear", "training_linear"]

# One fixed vector of random signs: both operands of the weight gradient must be rotated alike.
SIGNS = (1.0, 1.0, 1.0, -1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 1.0, -1.0, 1.0, -1.0, -1.0)


@dataclass(frozen=True)
class Recipe:
    """What is done to the operands; the default is that of NVIDIA's NVFP4 pretraining.

    Args:
        square_weights: one scale per 16x16 weights, so that W and its transpose have the same codes.
        stochastic_gradients: gradients are rounded stochastically, which keeps them unbiased.
        hadamard: the operands of the weight gradient are rotated in blocks of 16 tokens, which spreads outliers.
        four_over_six: per block the better of two scales, for weights and activations; see `quantize`.
    """

    square_weights: bool = True
    stochastic_gradients: bool = True
    hadamard: bool = True
    four_over_six: bool = False


def training_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seed: Tensor | None = None, recipe: Recipe | None = None
) -> Tensor:
    r"""Returns ``x @ W^T + bias`` with both operands in NVFP4, in the forward product and in those of its gradients.

    ========  ===========================  ==================================
    product   operands                     quantised
    ========  ===========================  ==================================
    y         x ``[T, K]``, W ``[N, K]``   along K: nearest; W in 16x16 blocks
    dx        dy ``[T, N]``, W^T           along N: dy stochastic
    dW        dy^T ``[N, T]``, x^T         along T: rotated, dy^T stochastic
    ========  ===========================  ==================================

    Args:
        x: ``[..., K]``, float32, float16 or bfloat16; under autocast it is cast first.
        weight: ``[N, K]``, any floating dtype: the master weights. Sizes that are not multiples of 16, of tokens too,
            are padded with zeros.
        bias: ``[N]`` or None; added by the forward product in the dtype of x.
        seed: int64 ``[2]`` on the device of x: key and offset of the stochastic rounding; this offset and the next one
            are used. None: drawn from torch's default generator where a gradient will be needed.
        recipe: a `Recipe`; None: the default.
    Returns:
        ``[..., N]`` in the dtype of x. For the backward pass x and W are kept in NVFP4: 0.56 bytes per element.
        Deterministic for a given seed.
    Raises:
        RuntimeError: dtypes or devices that `quantize` does not take.
    Source: NVIDIA, "Pretraining Large Language Models with NVFP4" (arXiv:2509.25149); TransformerEngine's
    ``NVFP4BlockScaling`` recipe and its sign vector.

    >>> w = torch.randn(32, 16, requires_grad=True)
    >>> training_linear(torch.randn(4, 16), w).sum().backward()
    >>> w.grad.shape
    torch.Size([32, 16])
    """
    recipe = recipe or Recipe()
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    if seed is None and recipe.stochastic_gradients and torch.is_grad_enabled():
        seed = torch.randint(2**63 - 1, (2,), device=x.device)
    return _Product.apply(x, weight, bias, seed, recipe)


class _Product(torch.autograd.Function):
    """Forward and gradients of `training_linear`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, seed: Tensor | None, recipe: Recipe) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        master = _whole_blocks(weight.detach().float() if weight.dtype == torch.float64 else weight.detach())
        options = {"four_over_six": recipe.four_over_six}
        of_weights = {"block": "16x16" if recipe.square_weights else "1x16", **options}
        w = _quantize(master, **of_weights)
        y = gemm(_quantize(_whole_blocks(rows, tokens=False), **options), w, x.dtype)[:, : weight.shape[0]]
        y = y if bias is None else y + bias.to(x.dtype)

        ctx.recipe, ctx.sizes = recipe, (x.shape, weight.shape)
        ctx.dtypes = (x.dtype, weight.dtype, None if bias is None else bias.dtype)
        kept = [seed]
        if ctx.needs_input_grad[0]:
            kept += _quantize(master.mT, **of_weights)[:3]
        if ctx.needs_input_grad[1]:
            kept += _quantize(_whole_blocks(rows).mT, hadamard=_signs(recipe, x.device), **options)[:3]
        ctx.save_for_backward(*kept)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        (seed, *kept), recipe, (x_shape, (n, k)) = ctx.saved_tensors, ctx.recipe, ctx.sizes
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        rows = grad_y.reshape(-1, n)
        options = {"rounding": "stochastic" if recipe.stochastic_gradients else "nearest"}
        seeds = (None, None) if seed is None else (seed, seed + _second(seed))
        dx = dw = dbias = None
        if ctx.needs_input_grad[0]:
            dy = _quantize(_whole_blocks(rows, tokens=False), seed=seeds[0], **options)
            dx = gemm(dy, NVFP4Tensor.from_parts(*kept[:3]), x_dtype)[:, :k].reshape(x_shape)
        if ctx.needs_input_grad[1]:
            signs = _signs(recipe, rows.device)
            dyt = _quantize(_whole_blocks(rows).mT, seed=seeds[1], hadamard=signs, **options)
            dw = gemm(dyt, NVFP4Tensor.from_parts(*kept[-3:]), torch.float32)[:n, :k].to(weight_dtype)
        if bias_dtype is not None and ctx.needs_input_grad[2]:
            dbias = rows.sum(0, dtype=torch.float32).to(bias_dtype)
        return dx, dw, dbias, None, None


def _quantize(x: Tensor, hadamard: Tensor | None = None, seed: Tensor | None = None, **options) -> NVFP4Tensor:
    """`quantize`, but stochastic rounding takes its seed, int64 ``(key, offset)``."""
    parts = torch.ops.n3.nvfp4_quantize.default(x.detach(), None, hadamard, seed, **options)
    return NVFP4Tensor(*parts, "linear", tuple(x.shape))


def _whole_blocks(matrix: Tensor, tokens: bool = True) -> Tensor:
    """Zeros added up to multiples of 16 columns, and rows unless they are ``tokens`` that nothing is summed over: they
    add nothing to a sum."""
    rows, columns = -matrix.shape[0] % 16 if tokens else 0, -matrix.shape[1] % 16
    return F.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


def _second(seed: Tensor) -> Tensor:
    """(0, 1): the next offset under the same key."""
    return torch.arange(2, device=seed.device)


def _signs(recipe: Recipe, device: torch.device) -> Tensor | None:
    return torch.tensor(SIGNS, device=device) if recipe.hadamard else None


class TrainingLinear(nn.Linear):
    """`torch.nn.Linear` whose products, forward and backward, have NVFP4 operands: see `training_linear`.

    Parameters and state dict are those of `torch.nn.Linear`; the master weights keep their dtype. Stochastic rounding
    draws its seeds from torch's default generator, so a run that restores the generator's state repeats, recomputation
    by `torch.utils.checkpoint` included.

    Args:
        in_features, out_features, bias, device, dtype: as of `torch.nn.Linear`.
        recipe: a `Recipe`; None: the default.

    >>> layer = TrainingLinear(32, 48)
    >>> layer(torch.randn(5, 32)).shape
    torch.Size([5, 48])
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None, *,
        recipe: Recipe | None = None,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias, device, dtype)
        self.recipe = recipe or Recipe()

    @classmethod
    def from_linear(cls, linear: nn.Linear, recipe: Recipe | None = None) -> TrainingLinear:
        """A layer with the very parameters of ``linear``."""
        new = cls(
            linear.in_features, linear.out_features, linear.bias is not None, "meta", linear.weight.dtype,
            recipe=recipe,
        )  # fmt: skip
        new.weight, new.bias = linear.weight, linear.bias
        return new

    def forward(self, x: Tensor) -> Tensor:
        return training_linear(x, self.weight, self.bias, recipe=self.recipe)
