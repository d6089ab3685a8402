"""The functions of mamba_ssm 2.3 and causal_conv1d 1.7, with their signatures and their semantics, on n3 operators.

They run on any device, take any strides, and differentiate where those do. Beyond those libraries: ``dt_bias`` and
``D`` may be None everywhere, ``seq_idx`` goes together with initial and final states, gradients reach initial states in
packed batches. What is only a hint to a kernel of theirs (``chunk_size``, ``state_dtype``) is accepted: states between
chunks are float32 here.

``seq_idx`` is turned into sequence ends, whose number the host must know: one synchronisation on a GPU. Engines use
`n3kernels.mamba.ssd_scan` with ``cu_seqlens``, which has none.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .conv1d import causal_conv1d
from .conv1d_update import causal_conv1d_update_slots
from .gated_norm import gated_rms_norm
from .ssd_scan import ssd_scan
from .ssm_update import ssm_update

__all__ = [
    "RMSNorm",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "causal_conv1d_varlen_states",
    "layernorm_fn",
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    "rmsnorm_fn",
    "selective_state_update",
]


# ---------------------------------------------------------------- scan


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r"""`n3kernels.mamba.ssd_scan` under the name and arguments of ``mamba_ssm.ops.triton.ssd_combined``.

    Args:
        x: ``[batch, seqlen, nheads, headdim]``; dt: ``[batch, seqlen, nheads]``; A: ``[nheads]``;
        B, C: ``[batch, seqlen, ngroups, dstate]``; D: ``[nheads]`` or ``[nheads, headdim]``; z: as x;
        dt_bias: ``[nheads]``; initial_states: ``[batch, nheads, headdim, dstate]``: of the first sequence of each row.
        seq_idx: ``[batch, seqlen]``, integer: the state starts from zero where it changes.
        cu_seqlens: ``[sequences + 1]``, int32, read with ``return_varlen_states`` alone; the batch is then 1.
        chunk_size, state_dtype: hints.
        dt_softplus, dt_limit: ``dt = clamp(softplus(dt + dt_bias), *dt_limit)``.
    Returns:
        ``out``, shape and dtype of x; with ``return_final_states`` also the state after each row's last token,
        ``[batch, nheads, headdim, dstate]``, with ``return_varlen_states`` also the state after each sequence of
        ``cu_seqlens``, each of which starts from zero; float32 both. ``(out, final, varlen)`` with both.
    Raises:
        RuntimeError: as `n3kernels.mamba.ssd_scan`. ValueError: ``return_varlen_states`` without cu_seqlens or with
            a batch that is not 1.
    Source: mamba_ssm 2.3 (github.com/state-spaces/mamba), ``mamba_chunk_scan_combined``.

    >>> x, dt, A = torch.randn(2, 5, 4, 8), torch.rand(2, 5, 4), -torch.rand(4)
    >>> B, C = torch.randn(2, 2, 5, 2, 16)
    >>> mamba_chunk_scan_combined(x, dt, A, B, C, 64, return_final_states=True)[1].shape
    torch.Size([2, 4, 8, 16])
    """
    options = {"chunk_size": chunk_size, "dt_softplus": dt_softplus, **_limits(dt_limit)}

    def packed(ends: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor]:
        flat = (t if t is None else t.flatten(0, 1) for t in (x, dt, B, C, z))
        x_, dt_, B_, C_, z_ = flat
        y, states = ssd_scan(x_, dt_, A, B_, C_, D, z_, dt_bias, states, ends, **options)
        return y.view(x.shape), states

    if return_varlen_states and (cu_seqlens is None or x.shape[0] != 1):
        raise ValueError("return_varlen_states needs cu_seqlens and a batch of 1")
    if seq_idx is None or seq_idx.numel() == 0:
        out, final = ssd_scan(x, dt, A, B, C, D, z, dt_bias, initial_states, **options)
    else:
        ends, first, last = _runs(seq_idx)
        out, states = packed(ends, _spread(initial_states, first, len(ends) - 1))
        final = states[last]
    results = [out]
    if return_final_states:
        results.append(final)
    if return_varlen_states:
        with torch.no_grad():
            results.append(packed(cu_seqlens, None)[1])
    return results[0] if len(results) == 1 else tuple(results)


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The Mamba-2 mixer behind ``in_proj``: convolution, scan, gate, norm, and ``out_proj`` where it is given.

    Args:
        zxbcdt: ``[batch, seqlen, 2 d_nonssm + 2 dim + 2 ngroups dstate + nheads]``, dim = nheads * headdim: a SwiGLU
            branch (gate, then value) of any width, z, x, B, C, dt, in this order.
        conv1d_weight: ``[dim + 2 ngroups dstate, width]``; conv1d_bias: its first dimension, or None.
        dt_bias, A: ``[nheads]``; D: ``[nheads]``, with ``headdim``, or ``[nheads, headdim]``.
        initial_states, seq_idx, dt_limit, chunk_size, state_dtype: as in `mamba_chunk_scan_combined`; softplus always.
        return_final_states: also return the last states.
        activation: of the convolution, None, ``"silu"`` or ``"swish"``.
        rmsnorm_weight: ``[dim]``: y and z go through `rmsnorm_fn` in ``ngroups`` groups; None: y * silu(z).
        rmsnorm_eps, norm_before_gate: of that norm.
        outproj_weight, outproj_bias: of a last linear layer, or None.
        headdim, ngroups: the split of zxbcdt.
    Returns:
        ``[batch, seqlen, d_nonssm + dim]``, or out_proj's width; with ``return_final_states`` also the states,
        ``[batch, nheads, headdim, dstate]``, float32.
    Raises:
        RuntimeError: as the operators behind it. ValueError: sizes that do not fit each other, an ``outproj_bias``
            alone.
    Source: mamba_ssm 2.3 (github.com/state-spaces/mamba), ``mamba_split_conv1d_scan_combined``.

    >>> heads, headdim, dstate = 2, 8, 16
    >>> zxbcdt, weight = torch.randn(1, 5, 2 * 16 + 2 * 16 + 2), torch.randn(16 + 2 * 16, 4)
    >>> A, D = -torch.rand(2), torch.ones(2)
    >>> mamba_split_conv1d_scan_combined(zxbcdt, weight, None, None, A, D, 64, headdim=8).shape
    torch.Size([1, 5, 16])
    """
    heads = A.shape[0]
    if headdim is None:
        if D is None or D.dim() != 2:
            raise ValueError("headdim must be given unless D is [nheads, headdim]")
        headdim = D.shape[1]
    dim, conv_dim = heads * headdim, conv1d_weight.shape[0]
    states, rest = conv_dim - dim, zxbcdt.shape[-1] - dim - conv_dim - heads
    if states < 0 or states % (2 * ngroups) or rest < 0 or rest % 2:
        raise ValueError(
            f"zxbcdt of width {zxbcdt.shape[-1]} and conv1d_weight of {conv_dim} channels do not fit {heads} heads of "
            f"{headdim} in {ngroups} groups"
        )
    if outproj_bias is not None and outproj_weight is None:
        raise ValueError("outproj_bias must be None without outproj_weight")
    branch, z, xBC, dt = zxbcdt.split([rest, dim, conv_dim, heads], dim=-1)
    xBC = causal_conv1d_fn(xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation)
    x, B, C = xBC.transpose(1, 2).split([dim, states // 2, states // 2], dim=-1)
    x, B, C = x.unflatten(-1, (heads, headdim)), B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1))
    gate = z.unflatten(-1, (heads, headdim)) if rmsnorm_weight is None else None
    y, final = mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D, gate, dt_bias, initial_states, seq_idx,
        dt_softplus=True, dt_limit=dt_limit, return_final_states=True,
    )  # fmt: skip
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = gated_rms_norm(y, z, rmsnorm_weight, dim // ngroups, rmsnorm_eps, norm_before_gate)
    if rest:
        gate, value = branch.chunk(2, dim=-1)
        y = torch.cat([F.silu(gate) * value, y], dim=-1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, final) if return_final_states else y


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    r"""One token of the recurrence ``S = exp(A dt) S + dt x B^T``, ``out = S C + D x``, for running sequences.

    Args:
        state: ``[batch, nheads, headdim, dstate]``, or ``[batch, dim, dstate]`` (one head); written in place.
        x, dt, z: ``[batch, nheads, headdim]`` or ``[batch, dim]``; A: ``[nheads, headdim, dstate]`` or
            ``[dim, dstate]``; B, C: ``[batch, ngroups, dstate]`` or ``[batch, dstate]``; D, dt_bias:
            ``[nheads, headdim]`` or ``[dim]``.
        dt_softplus: dt goes through softplus, after dt_bias.
        state_batch_indices: ``[batch]``, integer: the slot of each sequence in ``state``; negative: padding.
    Returns:
        ``out``, shape and dtype of x. Where A, dt and dt_bias are one value per head, expanded (stride 0, as Mamba-2
        layers pass them), it is `n3kernels.mamba.ssm_update`; a Mamba-1 recurrence runs in plain PyTorch.
    Raises:
        RuntimeError: as `n3kernels.mamba.ssm_update`.
    Source: mamba_ssm 2.3 (github.com/state-spaces/mamba), ``selective_state_update``.

    >>> state, x, dt = torch.zeros(2, 4, 8, 16), torch.randn(2, 4, 8), torch.rand(2, 4, 1).expand(2, 4, 8)
    >>> A, (B, C) = -torch.rand(4, 1, 1).expand(4, 8, 16), torch.randn(2, 2, 1, 16)
    >>> selective_state_update(state, x, dt, A, B, C).shape
    torch.Size([2, 4, 8])
    """
    if state.dim() == 3:
        x, dt, A, B, C, D, z, dt_bias = (
            None if t is None else t.unsqueeze(d)
            for t, d in ((x, 1), (dt, 1), (A, 0), (B, -2), (C, -2), (D, 0), (z, 1), (dt_bias, 0))
        )
        return selective_state_update(
            state.unsqueeze(1), x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices
        ).squeeze(1)
    B, C = (t.unsqueeze(1) if t.dim() == 2 else t for t in (B, C))
    if _tied(A, 1, 2) and _tied(dt, 2) and (dt_bias is None or _tied(dt_bias, 1)):
        bias = None if dt_bias is None else dt_bias[:, 0]
        gate = None if z is None else z.to(x.dtype)
        return ssm_update(
            state, x, dt[..., 0], A[:, 0, 0], B.to(x.dtype), C.to(x.dtype), D, gate, bias, state_batch_indices,
            dt_softplus=dt_softplus, dt_min=-math.inf,
        )  # fmt: skip
    return _selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)


def _selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, indices: Tensor | None,
) -> Tensor:  # fmt: skip
    """The recurrence with a decay for every element of the state, in float32; no kernel of this library has it."""
    step = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    step = F.softplus(step) if dt_softplus else step
    B, C = (t.float().repeat_interleave(x.shape[1] // t.shape[1], dim=1) for t in (B, C))
    slots = torch.arange(len(x), device=x.device) if indices is None else indices.long()
    padding = slots < 0
    kept = state[slots.clamp(min=0)]
    h = torch.exp(step[..., None] * A.float()) * kept.float() + (step * x.float())[..., None] * B[:, :, None]
    state.index_copy_(0, slots[~padding], h[~padding].to(state.dtype))
    y = (h * C[:, :, None]).sum(-1)
    if D is not None:
        y = y + D.float() * x.float()
    if z is not None:
        y = y * F.silu(z.float())
    return y.masked_fill(padding[:, None, None], 0).to(x.dtype)


# ---------------------------------------------------------------- norms


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    r"""`n3kernels.mamba.gated_rms_norm` under the name and arguments of ``mamba_ssm.ops.triton.layernorm_gated``.

    Args:
        x, z: ``[..., dim]``; z None: no gate.
        weight, bias: ``[dim]``; the bias, or None, is added behind the weight and before a gate that comes last.
        eps, group_size, norm_before_gate: as there; group_size None: one group.
    Returns:
        ``[..., dim]``, dtype of x.
    Raises:
        RuntimeError: as `n3kernels.mamba.gated_rms_norm`.
    Source: mamba_ssm 2.3 (github.com/state-spaces/mamba), ``rmsnorm_fn``.

    >>> rmsnorm_fn(torch.randn(3, 8), torch.ones(8), None, torch.randn(3, 8), group_size=4).shape
    torch.Size([3, 8])
    """
    group_size = x.shape[-1] if group_size is None else group_size
    if bias is None:
        return gated_rms_norm(x, z, weight, group_size, eps, norm_before_gate)
    late = z is not None and norm_before_gate
    y = gated_rms_norm(
        x.float(), None if late or z is None else z.float(), weight, group_size, eps, norm_before_gate
    ) + bias.float()  # fmt: skip
    return (y * F.silu(z.float()) if late else y).to(x.dtype)


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
) -> Tensor:
    r"""`rmsnorm_fn`, or the same with the mean taken off first: a layer norm, which is plain PyTorch here.

    Args:
        x, weight, bias, z, eps, group_size, norm_before_gate: as in `rmsnorm_fn`.
        is_rms_norm: False: layer norm.
    Returns:
        ``[..., dim]``, dtype of x.
    Raises:
        RuntimeError: as `rmsnorm_fn`.
    Source: mamba_ssm 2.3 (github.com/state-spaces/mamba), ``layernorm_fn``.

    >>> layernorm_fn(torch.randn(3, 8), torch.ones(8), torch.zeros(8)).shape
    torch.Size([3, 8])
    """
    if is_rms_norm:
        return rmsnorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate)
    h, gate = x.float(), None if z is None else F.silu(z.float())
    if gate is not None and not norm_before_gate:
        h = h * gate
    size = x.shape[-1] if group_size is None else group_size
    h = F.layer_norm(h.unflatten(-1, (-1, size)), (size,), eps=eps).flatten(-2) * weight.float()
    if bias is not None:
        h = h + bias.float()
    if gate is not None and norm_before_gate:
        h = h * gate
    return h.to(x.dtype)


class RMSNorm(nn.Module):
    """`rmsnorm_fn` as a layer, as ``mamba_ssm.ops.triton.layernorm_gated.RMSNorm``.

    >>> RMSNorm(8, group_size=4)(torch.randn(3, 8), torch.randn(3, 8)).shape
    torch.Size([3, 8])
    """

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, group_size: int | None = None, norm_before_gate: bool = True,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return rmsnorm_fn(x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate)


# ---------------------------------------------------------------- convolution


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""`n3kernels.mamba.causal_conv1d` under the name and arguments of ``causal_conv1d``: channels before time.

    Args:
        x: ``[batch, dim, seqlen]``, any strides; the layout ``[batch, seqlen, dim]`` under it is the fast one.
        weight: ``[dim, width]``; bias: ``[dim]`` or None.
        seq_idx: ``[batch, seqlen]``, integer: the convolution starts anew where it changes; negative: zeros.
        initial_states: ``[batch, dim, width - 1]``: what was before the first token of each row.
        return_final_states: also return the last inputs, ``[batch, dim, width - 1]``, in ``final_states_out`` if given.
        activation: None, ``"silu"`` or ``"swish"``.
    Returns:
        ``[batch, dim, seqlen]``, dtype of x, channels next to each other in memory; with ``return_final_states`` also
        the states.
    Raises:
        RuntimeError: as `n3kernels.mamba.causal_conv1d`. NotImplementedError: another activation.
    Source: causal_conv1d 1.7 (github.com/Dao-AILab/causal-conv1d), ``causal_conv1d_fn``.

    >>> causal_conv1d_fn(torch.randn(2, 8, 5), torch.randn(8, 4), activation="silu").shape
    torch.Size([2, 8, 5])
    """
    rows, act = x.transpose(1, 2), _activation(activation)
    if seq_idx is None or seq_idx.numel() == 0:
        y, final = causal_conv1d(rows, weight, bias, initial_states, activation=act)
    else:
        ends, first, last = _runs(seq_idx)
        states = _spread(initial_states, first, len(ends) - 1)
        y, final = causal_conv1d(rows.flatten(0, 1), weight, bias, states, ends, activation=act)
        y, final = y.view(rows.shape).masked_fill(seq_idx[..., None] < 0, 0), final[last]
    if not return_final_states:
        return y.transpose(1, 2)
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return y.transpose(1, 2), final


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    r"""The next tokens' convolution under the name and arguments of ``causal_conv1d``: channels before time.

    Args:
        x: ``[batch, dim]`` or ``[batch, dim, seqlen]``.
        conv_state: ``[batch, dim, state_len]``, dtype of x, state_len >= width - 1; written in place.
        weight: ``[dim, width]``; bias: ``[dim]`` or None.
        activation: None, ``"silu"`` or ``"swish"``.
        cache_seqlens: ``[batch]``, int32: conv_state is a ring, in which input number p is in column
            ``p % state_len``; so many inputs came before. None: conv_state holds the last inputs, oldest first.
        conv_state_indices: ``[batch]``, integer: the slot of each sequence in conv_state; negative: padding.
    Returns:
        Shape and dtype of x.
    Raises:
        RuntimeError: as `n3kernels.mamba.causal_conv1d_update_slots`. NotImplementedError: another activation.
    Source: causal_conv1d 1.7 (github.com/Dao-AILab/causal-conv1d), ``causal_conv1d_update``.

    >>> causal_conv1d_update(torch.randn(2, 8), torch.zeros(2, 8, 3), torch.randn(8, 4)).shape
    torch.Size([2, 8])
    """
    tokens = x if x.dim() == 2 else x.transpose(1, 2)
    y = causal_conv1d_update_slots(
        tokens, conv_state, weight, bias, conv_state_indices,
        cache_seqlens=cache_seqlens, activation=_activation(activation),
    )  # fmt: skip
    return y if x.dim() == 2 else y.transpose(1, 2)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    r"""The last ``state_len`` tokens of each packed sequence, behind zeros where it is shorter.

    Args:
        x: ``[tokens, dim]``.
        cu_seqlens: ``[batch + 1]``, integer.
        state_len: columns of a state.
    Returns:
        ``[batch, dim, state_len]``, dtype of x.
    Raises:
        RuntimeError: sizes that do not fit.
    Source: causal_conv1d 1.7 (github.com/Dao-AILab/causal-conv1d), ``causal_conv1d_varlen_states``.

    >>> causal_conv1d_varlen_states(torch.arange(5.0)[:, None], torch.tensor([0, 1, 5]), 2)[:, 0]
    tensor([[0., 0.],
            [3., 4.]])
    """
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    at = ends + torch.arange(-state_len, 0, device=x.device)
    outside = at < starts
    states = x[at.masked_fill(outside, 0)] if len(x) else x.new_zeros(*at.shape, x.shape[1])
    return states.masked_fill(outside[..., None], 0).transpose(1, 2)


# ---------------------------------------------------------------- shared


def _activation(name: str | None) -> str | None:
    if name not in (None, "silu", "swish"):
        raise NotImplementedError(f"activation must be None, 'silu' or 'swish', got {name!r}")
    return None if name is None else "silu"


def _limits(dt_limit: tuple[float, float]) -> dict[str, float | None]:
    low, high = dt_limit
    return {"dt_min": float(low), "dt_max": None if math.isinf(high) else float(high)}


def _runs(seq_idx: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ends of the sequences in the flattened rows, from 0 on, and the first and last sequence of each row."""
    batch, length = seq_idx.shape
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    ends = F.pad(starts.flatten().nonzero().flatten().int(), (0, 1), value=batch * length)
    last = starts.sum(1).cumsum(0) - 1
    return ends, F.pad(last[:-1] + 1, (1, 0)), last


def _spread(states: Tensor | None, first: Tensor, sequences: int) -> Tensor | None:
    """Initial states of all sequences: each row's for its first, zeros for the others."""
    if states is None:
        return None
    return states.new_zeros(sequences, *states.shape[1:]).index_copy(0, first, states)


def _tied(t: Tensor, *dims: int) -> bool:
    """Whether t is one value along these dimensions, by its strides."""
    return all(t.stride(d) == 0 or t.shape[d] == 1 for d in dims)
