"""What the tests of the scan and of the update share: operands, the recurrence, the size of the terms."""

from __future__ import annotations

import torch
from conftest import DEVICE, fenced
from hypothesis import strategies as st

from n3kernels.mamba import reference_decode

# heads, groups, head_dim, d_state: group ratios 1, 2, 3 and, as in Nemotron-Nano-4B and -H-4B, 12 and 14
layouts = st.sampled_from([(1, 1, 1, 1), (4, 2, 8, 16), (3, 1, 5, 7), (2, 2, 16, 3), (12, 1, 4, 8), (14, 1, 3, 6)])
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
# D; gate; dt_bias; softplus; dt_min and dt_max
variants = st.tuples(
    st.sampled_from(["none", "head", "channel"]), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from([(0.0, None), (0.05, 0.4), (0.0, float("inf"))]),
)  # fmt: skip
PLAIN = ("head", True, True, True, (0.0, None))
# Published models: one group and its heads, as a tensor-parallel shard has them (of Granite, an eighth of the heads).
PUBLISHED = {
    "nemotron-3-nano": (8, 1, 64, 128),
    "nemotron-3-nano-4b": (12, 1, 80, 128),
    "nemotron-3-super": (16, 1, 64, 128),
    "nemotron-3-puzzle": (16, 1, 64, 96),
    "nemotron-h-4b": (14, 1, 64, 128),
    "nemotron-h-47b": (32, 1, 64, 256),
    "granite-4-h-small": (16, 1, 64, 128),
    "zamba2-7b": (56, 1, 64, 64),
}


def operands(tokens, layout, dtype=torch.float32, variant=PLAIN):
    """All operands but the state, and the options: x, dt, B, C and z are column slices of one projection."""
    (heads, groups, head_dim, d_state), (skip, gated, biased, softplus, limits) = layout, variant
    widths = [heads * head_dim, heads * head_dim, groups * d_state, groups * d_state, heads]
    columns = sum(widths)
    if head_dim % 8 == d_state % 16 == 0:  # as in a model: rows that tensor cores take
        columns += -columns % 8
    zxbcdt = fenced(torch.randn(*tokens, columns, device=DEVICE).to(dtype))
    z, x, B, C, dt = zxbcdt[..., : sum(widths)].split(widths, -1)
    D = {"none": None, "head": fenced(torch.randn(heads)), "channel": fenced(torch.randn(heads, head_dim))}[skip]
    call = {
        "x": x.unflatten(-1, (heads, head_dim)),
        "dt": dt,
        "A": fenced(-torch.rand(heads) * 8),
        "B": B.unflatten(-1, (groups, d_state)),
        "C": C.unflatten(-1, (groups, d_state)),
        "D": D,
        "z": z.unflatten(-1, (heads, head_dim)) if gated else None,
        "dt_bias": fenced(torch.randn(heads) - 2) if biased else None,
    }
    call = {name: None if t is None else t.to(DEVICE) for name, t in call.items()}
    return call, {"dt_softplus": softplus, "dt_min": limits[0], "dt_max": limits[1]}


def states(count, layout, dtype=torch.float32):
    heads, _, head_dim, d_state = layout
    return fenced(torch.randn(count, heads, head_dim, d_state, device=DEVICE).to(dtype))


def widened(call):
    """The same call in float64."""
    return {name: t.double() if t is not None and t.is_floating_point() else t for name, t in call.items()}


def recurrence(call, options, initial_states=None):
    """y and the last state of a batch of sequences, token by token in float64."""
    heads, head_dim = call["x"].shape[-2:]
    shape = (len(call["x"]), heads, head_dim, call["B"].shape[-1])
    state = torch.zeros(shape, dtype=torch.double, device=DEVICE)
    if initial_states is not None:
        state.copy_(initial_states)
    return reference_decode.ssm_update(state, **widened(call), **options), state


def magnitude(call, options, initial_states=None):
    """The sums of the terms' magnitudes that make up y and the last state: what rounding errors are relative to."""
    sizes = {name: t if t is None or name in ("A", "dt", "dt_bias") else t.abs() for name, t in call.items()}
    initial = None if initial_states is None else initial_states.abs()
    y, state = recurrence({**sizes, "z": None}, options, initial)
    gate = 1 if call["z"] is None else torch.nn.functional.silu(call["z"].double()).abs()
    return y * gate, state


def rms_error(out, truth, dims):
    """Largest RMS error of a part relative to its RMS; a part is what remains when `dims` are averaged away."""
    error = (out.double() - truth.double()).square().mean(dims).sqrt()
    return (error / truth.double().square().mean(dims).sqrt()).max().item()
