"""Every instruction set, tile, panel and number of threads of the CPU products gives the same bits. The choice of the
instruction set is made once per process, so run as a program this file computes and prints digests:
``N3_CPU_ISA=generic python tests/moe/test_experts_isa.py``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = (None, "relu2", "silu", "gelu")
SIZES = (1, 2, 3, 4, 5, 6, 7, 12, 13, 14, 26, 27, 0, 97)  # of groups: all tiles of tokens, and more than one batch
# widths: parts of a chunk, whole chunks and steps, more than one block of k; outputs: parts of a tile, blocks of rows
SHAPES = ((1, 2), (5, 4), (8, 6), (21, 16), (40, 34), (96, 18), (1100, 20))
Keep = Callable[..., None]  # keep(name, *tensors)


def groups(width: int, outputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, w, offsets with groups of all SIZES."""
    x = torch.randn(sum(SIZES), width).to(dtype)
    w = (torch.randn(len(SIZES), outputs, width) * width**-0.5).to(dtype)
    return x, w, torch.tensor((0, *SIZES)).cumsum(0).to(torch.int32)


def dense_groups(keep: Keep) -> None:
    for dtype in DTYPES:
        for i, shape in enumerate(SHAPES):
            x, w, offsets = groups(*shape, dtype)
            for activation in ACTIVATIONS if shape == (21, 16) else [ACTIVATIONS[i % 4]]:
                y = torch.ops.n3.grouped_linear(x, w, offsets, None, torch.randn(len(x)), activation=activation)
                keep(f"grouped_linear {dtype} {shape} {activation}", y)


def nvfp4(num_groups: int, outputs: int, width: int) -> list[torch.Tensor]:
    scale = torch.rand(num_groups, outputs, width // 16) * 2 + 0.1
    return [torch.randint(0, 256, (num_groups, outputs, width // 2), dtype=torch.uint8),
            scale.to(torch.float8_e4m3fn), torch.rand(num_groups) + 0.1]  # fmt: skip


def nvfp4_groups(keep: Keep) -> None:
    for dtype in DTYPES:
        for width, outputs in ((16, 2), (48, 34), (160, 18)):
            x, _, offsets = groups(width, outputs, dtype)
            q, *scales = nvfp4(len(SIZES), outputs, width)
            for activation in (None, "silu"):
                y = torch.ops.n3.grouped_linear(x, q, offsets, None, None, *scales, activation=activation)
                keep(f"grouped_linear nvfp4 {dtype} {width} {outputs} {activation}", y)


def experts(keep: Keep) -> None:
    for dtype in DTYPES:
        for width, inner, form in ((9, 13, "dense"), (32, 40, "dense"), (32, 48, "nvfp4")):
            x, weights = torch.randn(60, width).to(dtype), torch.randn(60, 3)
            ids = torch.randint(-1, 7, (60, 3), dtype=torch.int32) // 2  # experts of 9 slots and more
            for activation in ACTIVATIONS[1:]:
                rows = inner if activation == "relu2" else 2 * inner
                name = f"moe_experts {form} {dtype} {width} {activation}"
                if form == "nvfp4":
                    up, down = nvfp4(3, rows, width), nvfp4(3, width, inner)
                    args = (x, up[0], down[0], ids, weights, *up[1:], *down[1:])
                else:
                    args = (x, torch.randn(3, rows, width).to(dtype) / 4, torch.randn(3, width, inner).to(dtype) / 4,
                            ids, weights)  # fmt: skip
                keep(name, torch.ops.n3.moe_experts(*args, activation=activation))


FAMILIES = (dense_groups, nvfp4_groups, experts)


def digests() -> dict[str, str]:
    import n3kernels
    from n3kernels import _host

    found = {"isa": _host.cpu_isa()}

    def keep(name: str, *tensors: torch.Tensor) -> None:
        data = b"".join(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
        found[name] = hashlib.sha256(data).hexdigest()

    with n3kernels.use_backend("cpu"):
        for family in FAMILIES:
            torch.manual_seed(0)
            family(keep)
    return found


def test_every_instruction_set_gives_the_same_bits():
    from instruction_sets import assert_same_bits_on_every_set  # not where this module runs as a program

    assert_same_bits_on_every_set(__file__)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_tile_agrees_with_the_definition(shape, dtype):
    x, w, offsets = groups(*shape, dtype)
    y = torch.ops.n3.grouped_linear(x, w, offsets)
    truth = torch.cat([a @ b.T for a, b in zip(x.double().split(SIZES), w.double(), strict=True)])
    assert (y - truth).norm() <= (1e-6 if dtype == torch.float32 else 3e-3) * truth.norm()
    assert (y - truth).abs().max() <= 2e-2 * truth.abs().max()  # no single element is off


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_does_not_see_its_group(shape, dtype):
    """One row and one weight, in groups of all sizes and at every place of a tile: the same bits."""
    _, w, offsets = groups(*shape, dtype)
    x = torch.randn(1, shape[0]).to(dtype)
    gather = torch.zeros(sum(SIZES), dtype=torch.int32)
    y = torch.ops.n3.grouped_linear(x, w[:1].expand_as(w), offsets, gather)
    assert torch.equal(y, y[:1].expand_as(y))


@pytest.mark.parametrize("shape", [(40, 34), (1100, 200)])
def test_threads_do_not_show(shape):
    x, w, offsets = groups(*shape, torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(torch.ops.n3.grouped_linear(x, w, offsets, activation="silu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [1, 13])
def test_scratch_memory_may_hold_anything(inner, dtype):
    """Rows are completed to whole chunks of 8: with zeros, for zero times what was there before may be NaN."""
    import n3kernels

    x, weights, ids = torch.randn(9, 13).to(dtype), torch.randn(9, 2), torch.randint(0, 3, (9, 2), dtype=torch.int32)
    w_up, w_down = torch.randn(3, 2 * inner, 13).to(dtype), torch.randn(3, 13, inner).to(dtype)
    with n3kernels.use_backend("cpu"):
        for floats in (100, 300, 1000):
            junk = [torch.full((floats,), torch.nan) for _ in range(300)]
            del junk  # to be handed out again
            y = torch.ops.n3.moe_experts(x, w_up, w_down, ids, weights, activation="silu")
            assert not y.isnan().any()


if __name__ == "__main__":
    for name, digest in digests().items():
        print(f"{name} = {digest}")
