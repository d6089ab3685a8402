"""What the tests of the mixer's two operators share: operands, the composition in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from conftest import DEVICE, fenced
from hypothesis import strategies as st

from n3kernels.mamba import reference_decode

INT = {"dtype": torch.int32, "device": DEVICE}
SMALL = (4, 2, 8, 16)  # heads, groups, head_dim, d_state
WIDTH = 4

# width of the convolution; its bias and activation; D; dt_bias; softplus; norm: its groups, before the gate or behind
variants = st.tuples(
    st.integers(1, 4), st.booleans(), st.sampled_from([None, "silu"]), st.sampled_from(["none", "head", "channel"]),
    st.booleans(), st.booleans(), st.sampled_from(["none", "default", "whole"]), st.booleans(),
)  # fmt: skip
PLAIN = (WIDTH, True, "silu", "head", True, True, "default", False)


def mixer(tokens, layout=SMALL, dtype=torch.float32, variant=PLAIN, slots=5, more=0, state_dtype=torch.float32):
    """All operands by name, and the options. Rows of zxbcdt are slices of wider ones."""
    (heads, groups, head_dim, d_state), (width, biased, activation, skip, dt_biased, softplus, norm, before) = (
        layout, variant,
    )  # fmt: skip
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * d_state
    D = {"none": None, "head": fenced(torch.randn(heads)), "channel": fenced(torch.randn(heads, head_dim))}[skip]
    call = {
        "zxbcdt": fenced(torch.randn(*tokens, inner + channels + heads + 7).to(dtype))[..., 3:-4],
        "conv_weight": fenced(torch.randn(channels, width) / 2),
        "conv_bias": fenced(torch.randn(channels)) if biased else None,
        "conv_state": fenced(torch.randn(slots, channels, width - 1 + more).to(dtype)),
        "ssm_state": fenced(torch.randn(slots, heads, head_dim, d_state).to(state_dtype)),
        "A": fenced(-torch.rand(heads) * 8),
        "D": D,
        "dt_bias": fenced(torch.randn(heads) - 2) if dt_biased else None,
        "norm_weight": None if norm == "none" else fenced(torch.randn(inner)),
    }
    options = {"activation": activation, "norm_before_gate": before, "dt_softplus": softplus}
    options |= {"group_size": inner if norm == "whole" else None, "dt_max": 2.0}
    return {name: None if t is None else t.to(DEVICE) for name, t in call.items()}, options


def clones(call):
    """The call on states of its own."""
    return {**call, "conv_state": call["conv_state"].clone(), "ssm_state": call["ssm_state"].clone()}


def definition(call, options, zxbcdt, conv_state, ssm_state):
    """Output and SSM state of one sequence [length, d] in float64, step by step; conv_state [C, K] or None: zeros."""
    heads, head_dim, d_state = call["ssm_state"].shape[1:]
    weight = call["conv_weight"].double()
    channels, width = weight.shape
    inner = heads * head_dim
    z, xbc, dt = zxbcdt.double().split([inner, channels, heads], -1)
    past = xbc.new_zeros(width - 1, channels)
    if conv_state is not None and width > 1:
        past = conv_state.double()[:, -(width - 1) :].T
    raw = torch.cat([past, xbc])
    out = sum(raw[k : k + len(xbc)] * weight[:, k] for k in range(width))
    out = out if call["conv_bias"] is None else out + call["conv_bias"].double()
    out = F.silu(out) if options["activation"] else out
    width_of_B = (channels - inner) // 2
    x, B, C = out.split([inner, width_of_B, width_of_B], -1)
    x, B, C = x.unflatten(-1, (heads, head_dim)), B.unflatten(-1, (-1, d_state)), C.unflatten(-1, (-1, d_state))
    state = call["ssm_state"].new_zeros(1, heads, head_dim, d_state, dtype=torch.double)
    if ssm_state is not None:
        state.copy_(ssm_state)
    A, D, dt_bias = (None if call[n] is None else call[n].double() for n in ("A", "D", "dt_bias"))
    limits = {"dt_softplus": options["dt_softplus"], "dt_max": options["dt_max"]}
    y = reference_decode.ssm_update(state, x[None], dt[None], A, B[None], C[None], D, None, dt_bias, **limits)[0]
    y, gate = y.flatten(-2), F.silu(z)
    if call["norm_weight"] is None:
        return y * gate, state[0]
    y = y if options["norm_before_gate"] else y * gate
    groups = y.unflatten(-1, (-1, options["group_size"] or inner // B.shape[1]))
    y = (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * call["norm_weight"].double()
    return y * gate if options["norm_before_gate"] else y, state[0]


def assert_is_the_mixer(y, truth, dtype):
    """Relative to the RMS of the sequence: 1e-5 for float32, 4e-3 for 16 bits, and ten times that for one element."""
    assert y.dtype == dtype and not y.isnan().any()
    bound, size = 1e-5 if dtype == torch.float32 else 4e-3, truth.square().mean().sqrt() + 1e-3
    error = (y.double() - truth).abs()
    assert error.square().mean().sqrt() <= bound * size, f"RMS error {error.square().mean().sqrt() / size:.3g}"
    assert (error <= 10 * bound * (size + truth.abs())).all(), f"largest error {error.max():.3g}"


def assert_is_the_state(state, truth, dtype):
    """RMS of the slot: 1e-5 from float32, 3e-3 from 16-bit inputs, beside the rounding of the state itself."""
    bound = 1e-5 if dtype == torch.float32 else 3e-3
    bound += 0 if state.dtype == torch.float32 else torch.finfo(state.dtype).eps
    error = (state.double() - truth).square().mean().sqrt()
    assert error <= bound * (truth.square().mean().sqrt() + 1e-3), f"RMS error {error:.3g}"


# ---------------------------------------------------------------- bad calls of both

GOOD_MIXER = {  # 6 heads of 4 channels, 3 groups of 8 states
    "zxbcdt": torch.zeros(2, 5, 24 + 72 + 6), "conv_weight": torch.zeros(72, 4), "conv_bias": torch.zeros(72),
    "conv_state": torch.ones(3, 72, 3), "ssm_state": torch.ones(3, 6, 4, 8), "A": torch.zeros(6), "D": torch.zeros(6),
    "dt_bias": torch.zeros(6), "norm_weight": torch.zeros(24),
}  # fmt: skip
ROWS = "conv_weight must have 24 + 2 G 8 rows with G a divisor of the 6 heads of ssm_state"
BAD_MIXER = [
    ({"zxbcdt": torch.zeros(2, 5, 102).int()}, "zxbcdt must be float32, float16 or bfloat16, got int32"),
    ({"zxbcdt": torch.zeros(2, 5, 103)}, "zxbcdt must have shape [2, 5, 102], got [2, 5, 103]"),
    ({"ssm_state": torch.zeros(3, 6, 4)}, "ssm_state must have 4 dimensions, got 3"),
    ({"conv_weight": torch.zeros(72, 1, 4)}, "conv_weight must have 2 dimensions, got 3"),
    ({"conv_weight": torch.zeros(72, 0)}, "conv_weight must have at least 1 tap, got 0"),
    ({"conv_weight": torch.zeros(71, 4)}, f"{ROWS}, got 71"),
    ({"conv_weight": torch.zeros(24, 4)}, f"{ROWS}, got 24"),
    ({"conv_weight": torch.zeros(24 + 64, 4)}, f"{ROWS}, got 88"),
    ({"conv_weight": torch.zeros(72, 4).int()}, "conv_weight must be float32, float16 or bfloat16, got int32"),
    ({"conv_bias": torch.zeros(71)}, "conv_bias must have shape [72], got [71]"),
    ({"conv_bias": torch.zeros(72).int()}, "conv_bias must be float32, float16 or bfloat16, got int32"),
    ({"conv_state": torch.zeros(72, 3)}, "conv_state must have 3 dimensions, got 2"),
    ({"conv_state": torch.zeros(2, 72, 3)}, "conv_state must have shape [3, 72, 3], got [2, 72, 3]"),
    ({"conv_state": torch.zeros(3, 72, 2)}, "conv_state must hold at least 3 inputs, got 2"),
    ({"conv_state": torch.zeros(3, 72, 3).half()}, "conv_state must have the dtype of zxbcdt (float32), got float16"),
    ({"A": torch.zeros(5)}, "A must have shape [6], got [5]"),
    ({"A": torch.zeros(6).int()}, "A must be float32, float16 or bfloat16, got int32"),
    ({"D": torch.zeros(6, 5)}, "D must have shape [6, 4], got [6, 5]"),
    ({"D": torch.zeros(6, 4, 8)}, "D must have 1 or 2 dimensions, got 3"),
    ({"dt_bias": torch.zeros(6, 4)}, "dt_bias must have shape [6], got [6, 4]"),
    ({"norm_weight": torch.zeros(6)}, "norm_weight must have shape [24], got [6]"),
    ({"norm_weight": torch.zeros(24).int()}, "norm_weight must be float32, float16 or bfloat16, got int32"),
    ({"group_size": 7}, "group_size must divide the 24 channels of norm_weight, got 7"),
    ({"group_size": 0}, "group_size must divide the 24 channels of norm_weight, got 0"),
    ({"activation": "gelu"}, "activation must be one of None, silu, got gelu"),
    ({"dt_min": 0.5, "dt_max": 0.25}, "dt_max must be at least dt_min (0.5), got 0.25"),
]
