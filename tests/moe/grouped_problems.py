"""Problems of grouped_linear, and what is right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from conftest import DEVICE, fenced
from hypothesis import strategies as st
from moe_problems import DTYPES, dense, nvfp4

NAMES = (None, "relu2", "silu", "gelu")
FUNCTIONS = {None: lambda h: h, "relu2": lambda h: F.relu(h).square(), "silu": F.silu, "gelu": F.gelu}
INT = {"dtype": torch.int32, "device": DEVICE}

# rows of x; rows of the result; groups; width and outputs, odd ones too; gather; row_scale; rows in no group
problems = st.tuples(
    st.integers(0, 6), st.integers(0, 12), st.integers(1, 4), st.integers(1, 40), st.integers(1, 24),
    st.booleans(), st.booleans(), st.booleans(), st.sampled_from(NAMES), st.sampled_from(DTYPES),
)  # fmt: skip


def inputs(sources, rows, groups, width, outputs, gathered, scaled, outside, activation, dtype, form="dense"):
    """The call's arguments by name; gather names rows twice, and -1."""
    rows = rows if gathered and sources else 0 if gathered else sources
    outputs *= 1 if activation in (None, "relu2") else 2
    width = -(-width // 16) * 16 if form == "nvfp4" else width  # whole blocks
    edges = torch.randint(0, rows + 1, (groups + 1,)).sort().values
    if not outside:
        edges[0], edges[-1] = 0, rows
    if form == "nvfp4":
        w = nvfp4(groups, outputs, width)
    else:
        w = fenced((torch.randn(groups, outputs, width) * width**-0.5).to(DEVICE, dtype))
    return {
        "x": fenced(torch.randn(sources, width).to(DEVICE, dtype)), "w": w, "offsets": fenced(edges.to(**INT)),
        "gather": fenced(torch.randint(-1, max(sources, 1), (rows,)).to(**INT)) if gathered else None,
        "row_scale": fenced(torch.randn(rows).to(DEVICE)) if scaled else None, "activation": activation,
    }  # fmt: skip


def definition(x, w, offsets, *, gather=None, row_scale=None, activation=None):
    """Row by row in float64, differentiable."""
    w, x = dense(w), x.double()
    rows = len(x) if gather is None else len(gather)
    source = list(range(rows)) if gather is None else gather.tolist()
    outputs = w.shape[1] // (1 if activation in (None, "relu2") else 2)
    out = [x.new_zeros(outputs)] * rows
    edges = offsets.tolist()
    for g, (start, end) in enumerate(zip(edges, edges[1:], strict=False)):
        for r in range(start, end):
            if source[r] < 0:
                continue
            h = w[g] @ x[source[r]]
            gate, up = (h, 1) if activation in (None, "relu2") else h.chunk(2)
            y = FUNCTIONS[activation](gate) * up
            out[r] = y if row_scale is None else row_scale[r].double() * y
    return torch.stack(out) if out else x.new_zeros(0, outputs)


def assert_within(y, truth, gate=None):
    """Relative L2 error of 3e-3 where 16 bits were rounded to, else of 1e-5; what is zero is so exactly."""
    assert y.shape == truth.shape and not y.isnan().any()
    gate = gate or (3e-3 if y.dtype in (torch.float16, torch.bfloat16) else 1e-5)
    tiny = 1e-7 if y.dtype == torch.float16 else 0.0  # half a subnormal unit
    assert (y.double() - truth).norm() <= gate * truth.norm() + tiny * truth.numel() ** 0.5
