from __future__ import annotations

import torch
from torch import Tensor

from .. import _dispatch
from .._checks import Check
from . import reference_mixer
from ._sequences import check_accepted_slots, check_indices
from ._supports import not_float64
from .mamba2_prefill import check_mixer, fake
from .ssm_update import check_rounding, check_state_dtype

__all__ = ["mamba2_decode"]


def mamba2_decode(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor,
    ssm_state: Tensor,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    norm_weight: Tensor | None,
    state_indices: Tensor | None = None,
    dst_state_indices: Tensor | None = None,
    *,
    num_accepted: Tensor | None = None,
    num_tokens: Tensor | None = None,
    parents: Tensor | None = None,
    state_scale: Tensor | None = None,
    seed: Tensor | None = None,
    rounding: str = "nearest",
    group_size: int | None = None,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    activation: str | None = "silu",
    dt_softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> Tensor:
    r"""Returns ``norm(update(act(conv(x | B | C)), dt) + D x, z)``, the mixer of running sequences.

    `causal_conv1d_update` (the shift of its three uses), `ssm_update` and `gated_rms_norm` in one call, for one token
    or T, with nothing rounded in between.

    Args:
        zxbcdt: ``[B, d]``, one token each, or ``[B, T, d]``; float32, float16 or bfloat16; rows of any stride. Columns:
            z (H P), x (H P), B (G N), C (G N), dt (H).
        conv_weight: ``[H P + 2 G N, W]``, floating point: the taps of x, B and C; their number gives G.
        conv_bias: ``[H P + 2 G N]``, floating point, or None.
        conv_state: ``[slots, H P + 2 G N, K]``, K >= W - 1, dtype of ``zxbcdt``, any strides: the last K raw inputs;
            written in place.
        ssm_state: ``[slots, H, P, N]``, float32, float16 or bfloat16, or int8 or float8_e4m3fn with ``state_scale``;
            any strides; written in place. Gives H, P and N.
        A: ``[H]``, floating point, negative.
        D: ``[H]`` or ``[H, P]``, floating point, or None.
        dt_bias: ``[H]``, floating point, or None.
        norm_weight: ``[H P]``, floating point. None: no norm, ``y * silu(z)``.
        state_indices, dst_state_indices: the slots where both states are read and written, as for `ssm_update`:
            ``state_indices`` is ``[B, n]`` with ``num_accepted``, ``dst_state_indices`` is ``[B]`` or ``[B, T]``.
        num_accepted, num_tokens, parents: as for `ssm_update`: how many of the previous call's tokens are kept, how
            many of this call's are not padding, and the tree they make up.
        state_scale, seed, rounding: how the SSM state is stored, as for `ssm_update`.
        group_size: channels per group of the norm; None: H P / G.
        eps, norm_before_gate: as for `gated_rms_norm`.
        activation: ``"silu"`` or None, of the convolution.
        dt_softplus, dt_min, dt_max: ``dt = clamp(softplus(dt + dt_bias), dt_min, dt_max)``, as for `ssd_scan`.
    Returns:
        ``[B, H P]`` or ``[B, T, H P]``, dtype of ``zxbcdt``, contiguous. Computed in float32 and rounded once; relative
        in RMS to the fp64 definition 1e-5 for float32, 4e-3 for 16-bit inputs. T tokens at once give the bits of T
        calls (with a float32 state), and a sequence's bits do not depend on the others. Every state is read before any
        is written; slots written must be distinct. Nothing is written when the call raises. Not differentiable.
    Raises:
        RuntimeError: a shape, dtype or value outside the above; the message names argument and values. The values of
            indices and counts are checked on the CPU only.
    Source: Mamba-2 (arXiv:2405.21060) sec. 7; Nemotron 3 ``mixer``.

    >>> H, P, G, N, slots = 4, 8, 2, 16, 3
    >>> zxbcdt, channels = torch.randn(2, 2 * H * P + 2 * G * N + H), H * P + 2 * G * N
    >>> conv_state, ssm_state = torch.zeros(slots, channels, 3), torch.zeros(slots, H, P, N)
    >>> A, D, dt_bias, weight = -torch.rand(H), torch.ones(H), torch.zeros(H), torch.ones(H * P)
    >>> conv = torch.randn(channels, 4)
    >>> mamba2_decode(zxbcdt, conv, None, conv_state, ssm_state, A, D, dt_bias, weight).shape
    torch.Size([2, 32])
    """
    return torch.ops.n3.mamba2_decode.default(
        zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, A, D, dt_bias, norm_weight, state_indices,
        dst_state_indices, num_accepted=num_accepted, num_tokens=num_tokens, parents=parents, state_scale=state_scale,
        seed=seed, rounding=rounding, group_size=group_size, eps=eps, norm_before_gate=norm_before_gate,
        activation=activation, dt_softplus=dt_softplus, dt_min=dt_min, dt_max=dt_max,
    )  # fmt: skip


def _check(
    zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, A, D, dt_bias, norm_weight, state_indices=None,
    dst_state_indices=None, *, num_accepted=None, num_tokens=None, parents=None, state_scale=None, seed=None,
    rounding="nearest", group_size=None, eps=1e-5, norm_before_gate=False, activation="silu", dt_softplus=True,
    dt_min=0.0, dt_max=None,
):  # fmt: skip
    check = Check("mamba2_decode")
    check.dim("zxbcdt", zxbcdt, 2, 3)
    check_mixer(
        check, zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, A, D, dt_bias, norm_weight,
        group_size, activation, dt_min, dt_max,
    )  # fmt: skip
    check_state_dtype(check, "ssm_state", ssm_state)
    batch, tokens = zxbcdt.shape[0], 1 if zxbcdt.dim() == 2 else zxbcdt.shape[1]
    where = (state_indices, dst_state_indices, num_accepted, num_tokens, parents)
    check_indices(check, batch, tokens, "ssm_state", ssm_state.shape[0], *where)
    check_accepted_slots(check, state_indices, num_accepted)
    check_rounding(check, ssm_state, state_scale, seed, rounding)
    slots = {"state_indices": state_indices, "dst_state_indices": dst_state_indices, "num_accepted": num_accepted}
    check.same_device("zxbcdt", zxbcdt, **slots, num_tokens=num_tokens, parents=parents)
    check.same_device("zxbcdt", zxbcdt, state_scale=state_scale, seed=seed)


def _cuda_takes(zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, *args, **kwargs):
    if ssm_state.dim() == 4 and ssm_state.shape[3] > 1024:
        return f"takes at most 1024 values per row of ssm_state, got {ssm_state.shape[3]}"
    return not_float64(zxbcdt, ssm_state, *args, **kwargs)


_dispatch.register(
    "mamba2_decode",
    check=_check,
    fake=fake,
    reference=reference_mixer.mamba2_decode,
    supports={"cpu": not_float64, "triton": not_float64, "cuda": _cuda_takes},
    triton="n3kernels.triton_ops.mamba.mixer:mamba2_decode",
)
