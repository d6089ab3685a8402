"""How ssd_scan runs on sm_90: the work split, shared memory, decay factors. Host code that the kernel compiles too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ssd_problems import PUBLISHED

from n3kernels.mamba._supports import tensor_core_mixer, tensor_core_scan

_host = pytest.importorskip("n3kernels._host", reason="_host was built for another Python")

# Of table 1.2 of the design: heads, groups, head_dim, d_state of whole models, then the shards of PUBLISHED.
MODELS = [
    (64, 8, 64, 128), (96, 8, 80, 128), (128, 8, 64, 128), (256, 8, 64, 128), (128, 8, 64, 96), (128, 8, 80, 128),
    (112, 8, 64, 128), (256, 8, 64, 256), (128, 1, 64, 128), (112, 2, 64, 64), (24, 1, 128, 256), (128, 8, 64, 128),
    *PUBLISHED.values(),
]  # fmt: skip
ODD = [(4, 2, 8, 16), (3, 1, 72, 112), (5, 5, 136, 48), (2, 1, 320, 256), (14, 2, 88, 16)]


@pytest.mark.parametrize("sms", [1, 78, 132])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", MODELS + ODD)
def test_every_channel_of_every_sequence_has_one_tile(layout, packed, sms):
    heads, groups, head_dim, d_state = layout
    for sequences in (0, 1, 3):
        args = sequences, packed, heads, groups, head_dim, d_state, sms
        wide_n, wide_p, blocks, threads, shared, stages, items = _host.ssd_scan_plan(*args)
        assert d_state <= wide_n and shared <= 227 * 1024 and stages >= 2
        assert threads in (256, 384) and blocks == min(items, sms)
        seen = np.zeros((sequences + packed, heads, head_dim), dtype=int)  # packed: the tokens behind the last as well
        tiles = _host.ssd_scan_tiles(*args)
        for item, sequence, group, head, channel in tiles:
            assert 0 <= item < items and head // (heads // groups) == group and channel < head_dim
            seen[sequence, head, channel : channel + wide_p] += 1
        assert (seen == 1).all()
        assert {item for item, *_ in tiles} == set(range(items))


def test_the_published_shapes_are_not_padded():
    """The 128 channels of Falcon-H1 are two tiles."""
    for heads, groups, head_dim, d_state in MODELS:
        wide_n, wide_p, *_, stages, _ = _host.ssd_scan_plan(8, True, heads, groups, head_dim, d_state, 132)
        assert head_dim % wide_p == 0 and wide_n == d_state
        assert stages >= 3 or d_state == 256


@pytest.mark.parametrize("columns, width", [(64, 64), (16, 80)])
@pytest.mark.parametrize("rows", [64, 96, 128, 256])
def test_elements_keep_apart(columns, width, rows):
    """Every element has its place, in its row's 16-byte pieces; eight rows of one column touch all 32 banks."""
    at = np.array([[_host.ssd_scan_element_at(columns, r, c, rows) for c in range(width)] for r in range(rows)])
    assert sorted(at.flatten()) == list(range(0, 2 * rows * width, 2))
    assert (at[:, ::8] % 16 == 0).all() and (np.diff(at.reshape(rows, -1, 8), axis=2) == 2).all()
    row_bytes = 2 * columns
    place = at // row_bytes
    assert (place == np.arange(rows)[:, None] + np.arange(width)[None] // columns * rows).all()  # never another row
    for first in range(0, rows, 8):
        for c in range(0, width, 8):
            assert len({int(a) // 16 % 8 for a in at[first : first + 8, c]}) == 8
    for eight in range(0, rows, 8):
        for j in range(width // 8):
            for r, c in ((0, 0), (3, 2), (7, 6)):
                corner = _host.ssd_scan_element_at(columns, r, c, 8)
                assert _host.ssd_scan_element_from(columns, corner, eight, j, rows) == at[eight + r, 8 * j + c]


def decays(A, dt):
    """The matrix decay_ij dt_j of a chunk as the kernel makes it, what remains of a state, what a token adds to it."""
    a = np.cumsum(_host.ssd_scan_log2_decay(A, dt), dtype=np.float32)
    matrix = np.zeros((64, 64), dtype=np.float32)
    for block in range(4):
        i = np.arange(16 * block, 16 * block + 16)
        if block:
            j, reference = np.arange(16 * block), a[16 * block - 1]
            rows = _host.ssd_scan_row_factor(a[i], reference)
            columns = _host.ssd_scan_column_factor(a[j], reference, dt[j])
            assert (rows <= 1.001).all() and (columns <= 1.001 * dt[j]).all()
            matrix[np.ix_(i, j)] = rows[:, None] * columns[None]
        inside = np.tril(np.ones((16, 16), dtype=bool))
        between = _host.ssd_scan_decay_between(
            np.where(inside, a[i][:, None], 0).astype(np.float32), np.where(inside, a[i][None], 0).astype(np.float32)
        )
        matrix[np.ix_(i, i)] = np.where(inside, between * dt[i][None], 0)
    return matrix, np.exp2(a), _host.ssd_scan_end_factor(a, a[-1], dt)


STEPS = {
    "none": lambda t: np.zeros(64),
    "small": lambda t: 1e-3 * t,
    "large": lambda t: 50 * t,
    "huge": lambda t: 1000 * t,
    "mixed": lambda t: np.where(np.arange(64) % 5 == 2, 1000 * t, 1e-3 * t),
    "one": lambda t: np.where(np.arange(64) == 40, 1e4, 0.1 * t),
    "endless": lambda t: np.where(np.arange(64) == 20, 3e38, 0.1 * t),
}


@pytest.mark.parametrize("A", [-1e-4, -1.0, -16.0, -1e4])
@pytest.mark.parametrize("steps", STEPS)
def test_decay_factors(A, steps):
    """Against float64, relative to dt_j: what is lost is below 2^-11; nothing is NaN, and masked entries are zero."""
    dt = STEPS[steps](np.random.default_rng(0).random(64)).astype(np.float32)
    matrix, start, end = decays(np.float32(A), dt)
    step = np.float64(A) * dt.astype(np.float64)
    want = np.zeros((64, 64))
    for j in range(64):  # summed from j on: a difference of long sums would not be exact either
        want[j:, j] = np.exp(np.cumsum(np.concatenate([[0.0], step[j + 1 :]])))
    exact = np.cumsum(step)
    scale = np.maximum(dt.astype(np.float64), 1e-30)
    want_end = want[-1] * (dt > 0)
    for got, truth in ((matrix / scale[None], want * (dt > 0)), (start, np.exp(exact)), (end / scale, want_end)):
        assert np.isfinite(got).all() and (got >= 0).all()
        assert np.abs(got - truth).max() <= 2.0**-11
    assert (np.triu(matrix, 1) == 0).all()
    if steps in ("small", "none"):
        assert np.abs(matrix / scale[None] - want * (dt > 0)).max() <= 1e-5


def test_no_step_leaves_a_state_as_it_is():
    _, start, end = decays(np.float32(-3), np.zeros(64, dtype=np.float32))
    assert (start == 1).all() and (end == 0).all()


def test_the_column_factors_of_three_blocks_lie_side_by_side():
    assert [_host.ssd_scan_first_column(b) for b in (1, 2, 3, 4)] == [0, 16, 48, 96]


# ---------------------------------------------------------------- what the kernel takes


def operands(dtype=torch.bfloat16, head_dim=64, d_state=128, pad=0):
    rows = torch.zeros(2, 5, 4 * head_dim + 2 * d_state + 8 + pad, dtype=dtype)
    x, B, C, dt = rows[..., : 4 * head_dim + 2 * d_state + 4].split([4 * head_dim, d_state, d_state, 4], -1)
    return [x.unflatten(-1, (4, head_dim)), dt, torch.zeros(4), B.unflatten(-1, (1, -1)), C.unflatten(-1, (1, -1))]


@pytest.mark.parametrize("head_dim, d_state", [(64, 128), (80, 128), (8, 16), (128, 256)])
def test_takes_column_slices(head_dim, d_state):
    call = operands(torch.float16, head_dim, d_state)
    assert tensor_core_scan(*call, None, call[0]) is None
    assert tensor_core_scan(*(t[:, :0] if t.dim() > 1 else t for t in call)) is None


def test_says_why_not():
    rows = "takes x, B, C and z whose rows are contiguous and begin at multiples of 16 bytes"
    x, dt, A, B, C = operands()
    assert "float32" in tensor_core_scan(*operands(torch.float32))
    assert "float64" in tensor_core_scan(x, dt, A.double(), B, C)
    assert "head_dim" in tensor_core_scan(*operands(head_dim=12, d_state=16))
    assert "d_state" in tensor_core_scan(*operands(d_state=24))
    assert "d_state" in tensor_core_scan(*operands(d_state=272))
    assert tensor_core_scan(*operands(pad=1)) == rows
    assert tensor_core_scan(x, dt, A, B, C.transpose(-1, 1).contiguous().transpose(-1, 1)) == rows
    assert tensor_core_scan(x, dt, A, B[:, :1].expand_as(B), C) == rows
    assert tensor_core_scan(x, dt, A, B, C, None, x.new_zeros(x.numel() + 1)[1:].view_as(x)) == rows


def test_the_mixer_takes_rows_of_any_alignment():
    def call(dtype=torch.bfloat16, head_dim=64, d_state=128):
        return torch.zeros(2, 5, 77, dtype=dtype), None, None, None, torch.zeros(1, 4, head_dim, d_state)

    assert tensor_core_mixer(*call()) is None
    why = "takes float16 and bfloat16 zxbcdt, got float32: tensor cores would round it"
    assert tensor_core_mixer(*call(torch.float32)) == why
    assert "float64" in tensor_core_mixer(*call(torch.float64))
    assert "head_dim" in tensor_core_mixer(*call(head_dim=12))
    assert "d_state" in tensor_core_mixer(*call(d_state=24))
