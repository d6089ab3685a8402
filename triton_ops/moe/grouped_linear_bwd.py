"""Gradients of grouped_linear by recomputing its pre-activations; workspace: rows (N + K) elements.

A gathered row of x receives the sum over the rows that were made of it, ascending, which a stable sort of gather lists.
Configurations follow the mean number of rows per group, as forward's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common import guard
from .grouped_grads import grads_config, row_grads, weight_grads
from .grouped_linear import product, product_config
from .grouped_plan import Tiles, mixed, tiles_of, weight_of
from .ordered_sums import sum_pieces, sum_segments

__all__ = ["grouped_linear_bwd"]


def grouped_linear_bwd(
    grad_y: Tensor,
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    gather: Tensor | None,
    row_scale: Tensor | None,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_y, x, offsets = grad_y.contiguous(), x.contiguous(), offsets.contiguous()
    gather, row_scale = (t if t is None else t.contiguous() for t in (gather, row_scale))
    rows, groups = grad_y.shape[0], w.shape[0]
    dscale = x.new_empty(0 if row_scale is None else rows, dtype=torch.float32)
    dh, tiles = grad_y, None
    if activation is not None or row_scale is not None:
        config = grads_config(x, rows, groups)
        dh = x.new_empty((rows, w.shape[1]), dtype=torch.float32 if x.dtype == torch.float16 else x.dtype)
        with guard(x):
            tiles = tiles_of(offsets, rows, config.block_m, outside=True)
        dots = row_grads(
            x, weight_of(w), grad_y, tiles, config, dh, gather=gather, scale=row_scale, activation=activation,
            want_dots=row_scale is not None,
        )  # fmt: skip
        if row_scale is not None:
            sum_pieces(dots, dscale)
    dx = _grad_x(dh, x, w, offsets, gather, tiles)
    dw = torch.empty_like(w, memory_format=torch.contiguous_format)
    weight_grads(dh, x, offsets, rows, gather, "b", 1, dw)
    return dx, dw, dscale


def _grad_x(dh: Tensor, x: Tensor, w: Tensor, offsets: Tensor, gather: Tensor | None, tiles: Tiles | None) -> Tensor:
    rows, dx = dh.shape[0], torch.empty_like(x)
    config = product_config(x, False, rows, w.shape[0])
    if tiles is None or tiles.block_m != config.block_m:
        with guard(x):
            tiles = tiles_of(offsets, rows, config.block_m, outside=True)
    tf32 = dh.dtype != x.dtype
    target = dx if gather is None else x.new_empty((rows, x.shape[1]), dtype=torch.float32)
    product(dh, weight_of(w.mT), tiles, mixed(config) if tf32 else config, target, tf32_in=tf32)
    return dx if gather is None else sum_segments(target, gather, dx)
