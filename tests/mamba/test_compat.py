"""The functions of mamba_ssm and causal_conv1d: their arguments, layouts and semantics, against plain loops."""

import inspect
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from n3kernels.integrations import mamba_ssm
from n3kernels.mamba import compat

HEADS, HEADDIM, GROUPS, DSTATE = 4, 8, 2, 16


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).float()


def scan_inputs(batch: int, length: int) -> dict[str, Tensor]:
    return {
        "x": randn(batch, length, HEADS, HEADDIM),
        "dt": randn(batch, length, HEADS, seed=1),
        "A": -randn(HEADS, seed=2).abs(),
        "B": randn(batch, length, GROUPS, DSTATE, seed=3),
        "C": randn(batch, length, GROUPS, DSTATE, seed=4),
    }


def recurrence(x, dt, A, B, C, D=None, z=None, dt_bias=None, state=None, resets=()):
    """One row of the batch, token by token in float64; returns outputs and the states after each token."""
    dt = F.softplus(dt.double() + (0 if dt_bias is None else dt_bias.double()))
    state = torch.zeros(HEADS, HEADDIM, DSTATE, dtype=torch.float64) if state is None else state.double()
    ys, states = [], []
    for t in range(len(x)):
        if t in resets:
            state = torch.zeros_like(state)
        Bt, Ct = (m[t].double().repeat_interleave(HEADS // GROUPS, 0)[:, None] for m in (B, C))
        state = torch.exp(dt[t] * A.double())[:, None, None] * state + (dt[t, :, None] * x[t])[..., None] * Bt
        y = (state * Ct).sum(-1)
        if D is not None:
            y = y + x[t] * (D[:, None] if D.dim() == 1 else D)
        ys.append(y if z is None else y * F.silu(z[t].double()))
        states.append(state)
    return torch.stack(ys), torch.stack(states)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error <= tolerance, float(error)


# ---------------------------------------------------------------- scan


@pytest.mark.parametrize("options", [(), ("D",), ("D2", "z", "dt_bias"), ("dt_bias", "initial_states")])
def test_chunk_scan(options):
    inputs = scan_inputs(2, 37)
    extra = {
        "D": randn(HEADS), "D2": randn(HEADS, HEADDIM), "z": randn(2, 37, HEADS, HEADDIM, seed=5),
        "dt_bias": randn(HEADS, seed=6), "initial_states": randn(2, HEADS, HEADDIM, DSTATE),
    }  # fmt: skip
    given = {name.rstrip("2"): extra[name] for name in options}
    y, final = compat.mamba_chunk_scan_combined(
        **inputs, chunk_size=16, **given, dt_softplus=True, return_final_states=True
    )
    for b in range(2):
        row = {k: v if k == "A" else v[b] for k, v in inputs.items()}
        args = {k: v for k, v in given.items() if k in ("D", "dt_bias")}
        gate = given["z"][b] if "z" in given else None
        state = given["initial_states"][b] if "initial_states" in given else None
        ys, states = recurrence(**row, **args, z=gate, state=state)
        close(y[b], ys)
        close(final[b], states[-1])
    assert final.dtype == torch.float32


def test_seq_idx_starts_the_state_anew_and_rows_keep_their_first_and_last():
    inputs, first = scan_inputs(2, 12), randn(2, HEADS, HEADDIM, DSTATE)
    seq_idx = torch.tensor([[0] * 5 + [1] * 7, [3] * 2 + [4] * 9 + [5]], dtype=torch.int32)
    y, final = compat.mamba_chunk_scan_combined(
        **inputs, chunk_size=4, initial_states=first, seq_idx=seq_idx, dt_softplus=True, return_final_states=True
    )
    for b, resets in enumerate([(5,), (2, 11)]):
        row = {k: v if k == "A" else v[b] for k, v in inputs.items()}
        ys, states = recurrence(**row, state=first[b], resets=resets)
        close(y[b], ys)
        close(final[b], states[-1])


@pytest.mark.parametrize("with_final", [False, True])
def test_varlen_states(with_final):
    inputs = scan_inputs(1, 12)
    ends = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    seq_idx = torch.tensor([[0] * 5 + [2] * 7], dtype=torch.int32)
    results = compat.mamba_chunk_scan_combined(
        **inputs, chunk_size=4, seq_idx=seq_idx, cu_seqlens=ends, dt_softplus=True,
        return_varlen_states=True, return_final_states=with_final,
    )  # fmt: skip
    row = {k: v if k == "A" else v[0] for k, v in inputs.items()}
    ys, states = recurrence(**row, resets=(5,))
    close(results[0][0], ys)
    close(results[-1][0], states[4])
    assert not results[-1][1].any()
    close(results[-1][2], states[11])
    assert len(results) == 2 + with_final
    with pytest.raises(ValueError, match="needs cu_seqlens"):
        compat.mamba_chunk_scan_combined(**inputs, chunk_size=4, return_varlen_states=True)


def test_dt_limit():
    inputs = scan_inputs(1, 6)
    y = compat.mamba_chunk_scan_combined(**inputs, chunk_size=4, dt_limit=(0.1, 0.2))
    inputs["dt"] = inputs["dt"].clamp(0.1, 0.2)
    assert torch.equal(y, compat.mamba_chunk_scan_combined(**inputs, chunk_size=4))


@pytest.mark.parametrize("packed", [False, True])
def test_scan_gradients_reach_every_input(packed):
    inputs = {k: v.requires_grad_() for k, v in scan_inputs(2, 9).items()}
    state = randn(2, HEADS, HEADDIM, DSTATE).requires_grad_()
    seq_idx = torch.tensor([[0] * 4 + [1] * 5, [0] * 9], dtype=torch.int32) if packed else None
    y, final = compat.mamba_chunk_scan_combined(
        **inputs, chunk_size=4, initial_states=state, seq_idx=seq_idx, dt_softplus=True, return_final_states=True
    )
    grads = torch.autograd.grad(y.sum() + final.sum(), [*inputs.values(), state])
    assert all(g.isfinite().all() and g.any() for g in grads)


# ---------------------------------------------------------------- the mixer


@pytest.mark.parametrize("norm", [None, True, False], ids=["gate", "norm-first", "gate-first"])
@pytest.mark.parametrize("branch", [0, 6])
@pytest.mark.parametrize("out", [False, True])
def test_split_conv1d_scan(norm, branch, out):
    dim, conv_dim, length = HEADS * HEADDIM, HEADS * HEADDIM + 2 * GROUPS * DSTATE, 11
    zxbcdt = randn(2, length, 2 * branch + dim + conv_dim + HEADS)
    weight, bias, dt_bias, A, D = randn(conv_dim, 4), randn(conv_dim), randn(HEADS, seed=7), -randn(HEADS).abs(), None
    seq_idx = torch.tensor([[0] * 4 + [1] * 7, [0] * 11], dtype=torch.int32)
    norm_weight = None if norm is None else randn(dim, seed=8)
    proj = randn(5, branch + dim) if out else None
    y, final = compat.mamba_split_conv1d_scan_combined(
        zxbcdt, weight, bias, dt_bias, A, D, 64, seq_idx=seq_idx, return_final_states=True, rmsnorm_weight=norm_weight,
        outproj_weight=proj, headdim=HEADDIM, ngroups=GROUPS, norm_before_gate=bool(norm),
    )  # fmt: skip
    for b, (begin, end) in ((0, (0, 4)), (0, (4, 11)), (1, (0, 11))):
        row = zxbcdt[b, begin:end].double()
        swiglu, z, xbc, dt = row.split([2 * branch, dim, conv_dim, HEADS], -1)
        xbc = F.silu(F.conv1d(F.pad(xbc.T, (3, 0)), weight.double()[:, None], bias.double(), groups=conv_dim).T)
        x, B, C = xbc.split([dim, GROUPS * DSTATE, GROUPS * DSTATE], -1)
        x, B, C = x.unflatten(-1, (HEADS, -1)), B.unflatten(-1, (GROUPS, -1)), C.unflatten(-1, (GROUPS, -1))
        ys, states = recurrence(x, dt, A, B, C, dt_bias=dt_bias)
        ys, gate = ys.flatten(-2), F.silu(z)
        if norm is None:
            ys = ys * gate
        else:
            h = (ys if norm else ys * gate).unflatten(-1, (GROUPS, -1))
            h = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)).flatten(-2) * norm_weight.double()
            ys = h * gate if norm else h
        ys = torch.cat([F.silu(swiglu[:, :branch]) * swiglu[:, branch:], ys], -1)
        close(y[b, begin:end], ys @ proj.double().T if out else ys)
        if end == 11:
            close(final[b], states[-1])


def test_split_conv1d_scan_says_what_does_not_fit():
    zxbcdt, weight, A = randn(1, 3, 100), randn(40, 4), -torch.ones(HEADS)
    with pytest.raises(ValueError, match="headdim must be given"):
        compat.mamba_split_conv1d_scan_combined(zxbcdt, weight, None, None, A, None, 64)
    with pytest.raises(ValueError, match="do not fit 4 heads of 8 in 3 groups"):
        compat.mamba_split_conv1d_scan_combined(zxbcdt, weight, None, None, A, None, 64, headdim=8, ngroups=3)


# ---------------------------------------------------------------- decode


@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("slots", [None, [5, -1, 0]])
def test_state_update_with_tied_heads(softplus, slots):
    batch, state = 3, randn(6, HEADS, HEADDIM, DSTATE)
    x, z = randn(batch, HEADS, HEADDIM), randn(batch, HEADS, HEADDIM, seed=1)
    dt, bias, A = randn(batch, HEADS), randn(HEADS), -randn(HEADS, seed=1).abs()
    B, C, D = randn(batch, GROUPS, DSTATE), randn(batch, GROUPS, DSTATE, seed=1), randn(HEADS, HEADDIM)
    before = state.clone()
    indices = None if slots is None else torch.tensor(slots, dtype=torch.int32)
    kept = state if slots is not None else state[:batch]
    y = compat.selective_state_update(
        kept, x, dt[..., None].expand_as(x), A[:, None, None].expand(-1, HEADDIM, DSTATE), B, C,
        D, z, bias[:, None].expand(-1, HEADDIM), softplus, indices,
    )  # fmt: skip
    written = set()
    for b, slot in enumerate(range(batch) if slots is None else slots):
        if slot < 0:
            assert not y[b].any()
            continue
        step = dt[b].double() + bias.double()
        step = F.softplus(step) if softplus else step
        Bt, Ct = (m[b].double().repeat_interleave(HEADS // GROUPS, 0)[:, None] for m in (B, C))
        h = torch.exp(step * A.double())[:, None, None] * before[slot] + (step[:, None] * x[b])[..., None] * Bt
        close(state[slot], h)
        close(y[b], ((h * Ct).sum(-1) + D * x[b]) * F.silu(z[b].double()))
        written.add(slot)
    for slot in set(range(6)) - written:
        assert torch.equal(state[slot], before[slot])


@pytest.mark.parametrize("heads", [False, True])
def test_state_update_of_a_mamba_1_recurrence(heads):
    lead = (HEADS,) if heads else ()
    state, before = randn(2, *lead, HEADDIM, DSTATE), randn(2, *lead, HEADDIM, DSTATE)
    x, dt, z = (randn(2, *lead, HEADDIM, seed=s) for s in range(3))
    A, D, bias = -randn(*lead, HEADDIM, DSTATE).abs(), randn(*lead, HEADDIM), randn(*lead, HEADDIM, seed=1)
    B, C = randn(2, *((1,) if heads else ()), DSTATE), randn(2, *((1,) if heads else ()), DSTATE, seed=1)
    y = compat.selective_state_update(state, x, dt, A, B, C, D, z, bias, True)
    step = F.softplus(dt.double() + bias)
    Bt, Ct = B[..., None, :].double(), C[..., None, :].double()
    h = torch.exp(step[..., None] * A) * before + (step * x)[..., None] * Bt
    close(state, h)
    close(y, ((h * Ct).sum(-1) + D * x) * F.silu(z.double()))


# ---------------------------------------------------------------- convolution and norms


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize("layout", ["time-last", "channels-last"])
def test_conv(activation, layout):
    x, weight, bias, before = randn(2, 12, 9), randn(12, 4), randn(12), randn(2, 12, 3)
    x = x if layout == "time-last" else x.transpose(1, 2).contiguous().transpose(1, 2)
    out = torch.empty(2, 12, 3)
    y, final = compat.causal_conv1d_fn(x, weight, bias, None, before, True, out, activation)
    whole = torch.cat([before, x], -1)
    expected = F.conv1d(whole.double(), weight.double()[:, None], bias.double(), groups=12)
    close(y, expected if activation is None else F.silu(expected))
    assert torch.equal(final, whole[..., -3:]) and final.data_ptr() == out.data_ptr()
    with pytest.raises(NotImplementedError, match="got 'relu'"):
        compat.causal_conv1d_fn(x, weight, activation="relu")


def test_conv_with_seq_idx_and_states():
    x, weight, before = randn(2, 12, 9), randn(12, 4), randn(2, 12, 3)
    seq_idx = torch.tensor([[0] * 4 + [1] * 3 + [-1] * 2, [2] * 9], dtype=torch.int32)
    y, final = compat.causal_conv1d_fn(x, weight, None, seq_idx, before, True)
    for b, begin, end in ((0, 0, 4), (0, 4, 7), (1, 0, 9)):
        past = before[b] if begin == 0 else torch.zeros(12, 3)
        whole = torch.cat([past, x[b, :, begin:end]], -1)
        close(y[b, :, begin:end], F.conv1d(whole, weight[:, None], groups=12))
    assert not y[0, :, 7:].any()
    assert torch.equal(final[1], x[1, :, -3:])


def test_rows_without_tokens_keep_their_states():
    nothing, before = torch.zeros(2, 0, dtype=torch.int32), randn(2, 12, 3)
    y, final = compat.causal_conv1d_fn(randn(2, 12, 0), randn(12, 4), None, nothing, before, True)
    assert y.shape == (2, 12, 0) and torch.equal(final, before)


@pytest.mark.parametrize("state_len", [3, 5])
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("tokens", [None, 2])
def test_conv_update_continues_the_convolution(state_len, ring, tokens):
    x, weight, bias = randn(3, 8, 12), randn(8, 4), randn(8)
    expected = F.silu(F.conv1d(F.pad(x, (3, 0)), weight[:, None], bias, groups=8))
    slots = torch.tensor([4, 0, 2], dtype=torch.int32)
    state, seen = torch.zeros(5, 8, state_len), torch.zeros(3, dtype=torch.int32)
    for t in range(0, 12, tokens or 1):
        step = x[..., t] if tokens is None else x[..., t : t + tokens]
        y = compat.causal_conv1d_update(step, state, weight, bias, "silu", seen if ring else None, slots)
        close(y, expected[..., t] if tokens is None else expected[..., t : t + tokens])
        seen += tokens or 1
    assert not state[1].any() and not state[3].any()


def test_varlen_conv_states():
    x = randn(9, 6)
    states = compat.causal_conv1d_varlen_states(x, torch.tensor([0, 2, 2, 9]), 4)
    assert torch.equal(states[0], torch.cat([torch.zeros(6, 2), x[:2].T], 1))
    assert not states[1].any()
    assert torch.equal(states[2], x[5:].T)


@pytest.mark.parametrize("function", ["rmsnorm_fn", "layernorm_fn"])
@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("options", ["", "z", "bias", "z bias"])
def test_norms(function, group_size, before, options):
    x, z, weight = randn(5, 24), randn(5, 24, seed=1), randn(24)
    z, bias = z if "z" in options else None, randn(24, seed=1) if "bias" in options else None
    y = getattr(compat, function)(x, weight, bias, z, 1e-5, group_size, before)
    h, gate = x.double(), 1 if z is None else F.silu(z.double())
    h = (h if before else h * gate).unflatten(-1, (-1, group_size or 24))
    if function == "layernorm_fn":
        h = h - h.mean(-1, keepdim=True)
    h = (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2) * weight
    h = h if bias is None else h + bias
    close(y, h * gate if before else h)


def test_the_norm_layer_has_the_names_of_a_checkpoint():
    assert [*compat.RMSNorm(8).state_dict()] == ["weight"]


# ---------------------------------------------------------------- signatures and imports


UPSTREAM = {  # argument names and defaults of mamba_ssm 2.3.2 and causal_conv1d 1.7.0
    "mamba_chunk_scan_combined": "x dt A B C chunk_size D=None z=None dt_bias=None initial_states=None seq_idx=None "
    "cu_seqlens=None dt_softplus=False dt_limit=(0.0,inf) return_final_states=False return_varlen_states=False "
    "state_dtype=None",
    "mamba_split_conv1d_scan_combined": "zxbcdt conv1d_weight conv1d_bias dt_bias A D chunk_size initial_states=None "
    "seq_idx=None dt_limit=(0.0,inf) return_final_states=False activation=silu rmsnorm_weight=None rmsnorm_eps=1e-06 "
    "outproj_weight=None outproj_bias=None headdim=None ngroups=1 norm_before_gate=True state_dtype=None",
    "selective_state_update": "state x dt A B C D=None z=None dt_bias=None dt_softplus=False state_batch_indices=None",
    "rmsnorm_fn": "x weight bias z=None eps=1e-06 group_size=None norm_before_gate=True",
    "layernorm_fn": "x weight bias z=None eps=1e-06 group_size=None norm_before_gate=True is_rms_norm=False",
    "causal_conv1d_fn": "x weight bias=None seq_idx=None initial_states=None return_final_states=False "
    "final_states_out=None activation=None",
    "causal_conv1d_update": "x conv_state weight bias=None activation=None cache_seqlens=None conv_state_indices=None",
    "causal_conv1d_varlen_states": "x cu_seqlens state_len",
}


@pytest.mark.parametrize("name", UPSTREAM)
def test_the_signature_is_upstream_s(name):
    parameters = inspect.signature(getattr(compat, name)).parameters.values()
    ours = [p.name if p.default is p.empty else f"{p.name}={p.default}".replace(" ", "") for p in parameters]
    assert ours == UPSTREAM[name].split()


IMPORTS = """
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm, rmsnorm_fn
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
import causal_conv1d, mamba_ssm.ops.triton.ssd_combined
"""


def run(code: str, path: str = "") -> str:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r})\n{code}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_imports_resolve_after_install():
    code = f"from n3kernels.integrations import mamba_ssm as n3\nn3.install(); assert not n3.install(){IMPORTS}"
    code += "print(causal_conv1d_fn.__module__, causal_conv1d.__version__)"
    assert run(code) == "n3kernels.mamba.compat 1.7.0\n"


def test_an_installed_package_is_replaced_on_request_only(tmp_path):
    package = tmp_path / "causal_conv1d"
    package.mkdir()
    (package / "__init__.py").write_text("causal_conv1d_fn = 'theirs'\n")
    (package / "other.py").write_text("value = 1\n")
    code = """
from n3kernels.integrations import mamba_ssm
assert not any(name.startswith("causal_conv1d") for name in mamba_ssm.install())
import causal_conv1d
assert causal_conv1d.causal_conv1d_fn == "theirs"
mamba_ssm.uninstall()
assert "causal_conv1d" in mamba_ssm.install(replace=True)
from causal_conv1d import causal_conv1d_fn
assert causal_conv1d_fn.__module__ == "n3kernels.mamba.compat"
mamba_ssm.uninstall()
from causal_conv1d import causal_conv1d_fn
assert causal_conv1d_fn == "theirs"
from causal_conv1d.other import value
"""
    run(code, str(tmp_path))


def test_uninstall_takes_everything_back():
    put = mamba_ssm.install()
    mamba_ssm.uninstall()
    assert put and not any(name in sys.modules for name in put)
