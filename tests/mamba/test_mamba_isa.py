"""Every instruction set of the CPU kernels gives the same bits. The choice is made once per process, so run as a
program this file computes and prints digests: ``N3_CPU_ISA=generic python tests/mamba/test_mamba_isa.py``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Keep = Callable[..., None]  # keep(name, *tensors)


def gated_norm(keep: Keep) -> None:
    op = torch.ops.n3
    for dtype in DTYPES:
        for groups, size in ((2, 37), (3, 96), (1, 5)):
            x, z, dy = (4 * torch.randn(40, groups * size).to(dtype) for _ in range(3))
            weight = torch.randn(groups * size)
            for gate in (z, None):
                for norm_before_gate in (False, True):
                    options = (size, 1e-5, norm_before_gate)
                    name = f"gated_rms_norm {dtype} {groups} {size} {gate is None} {norm_before_gate}"
                    keep(name, op.gated_rms_norm(x, gate, weight, *options))
                    keep(name + " bwd", *op.gated_rms_norm_bwd(dy, x, gate, weight, *options))


def conv1d(keep: Keep) -> None:
    op = torch.ops.n3
    for dtype in DTYPES:
        for channels, width in ((5, 1), (37, 2), (530, 3), (64, 4), (19, 6)):
            x, dy = (2 * torch.randn(2, 75, channels).to(dtype) for _ in range(2))
            weight, bias = torch.randn(channels, width), torch.randn(channels).to(dtype)
            state = torch.randn(2, channels, width - 1).to(dtype)
            for turned in (False, True):
                x, state = (t.mT.contiguous().mT if turned else t for t in (x, state))
                for activation in (None, "silu"):
                    name = f"causal_conv1d {dtype} {channels} {width} {turned} {activation}"
                    keep(name, *op.causal_conv1d(x, weight, bias, state, activation=activation))
                    grads = op.causal_conv1d_bwd(dy, None, x, weight, bias, state, None, activation)
                    keep(name + " bwd", *grads)
                    slots = state.clone()
                    y = op.causal_conv1d_update(x[:, :3], slots, weight, bias, activation=activation)
                    keep(name + " update", y, slots)


def ssd_scan(keep: Keep) -> None:
    op = torch.ops.n3
    for dtype in DTYPES:
        # heads, groups, head_dim, d_state: panels of two vectors, of one and of a part of one; all kinds of tiles
        for heads, groups, P, N in ((4, 2, 64, 128), (3, 1, 80, 96), (2, 2, 5, 7), (2, 1, 20, 13)):
            x, z = (torch.randn(2, 150, heads, P).to(dtype) for _ in range(2))
            B, C = (torch.randn(2, 150, groups, N).to(dtype) for _ in range(2))
            dt, A, bias = torch.randn(2, 150, heads), -torch.rand(heads) * 8, torch.randn(heads) - 2
            D, initial = torch.randn(heads, P), torch.randn(2, heads, P, N).to(dtype)
            name = f"ssd_scan {dtype} {heads} {P} {N}"
            keep(name, *op.ssd_scan(x, dt, A, B, C, D, z, bias, initial))
            keep(name + " plain", *op.ssd_scan(x, dt, A, B, C))
            state, tokens = torch.randn(4, heads, P, N).to(dtype), torch.tensor([40, 270], dtype=torch.int32)
            slots = (state, torch.tensor([2, 0]), None, None, tokens, torch.tensor([3, 1]))
            keep(name + " slots", op.ssd_scan.slots(x, dt, A, B, C, D, None, bias, *slots), state)
            grads = (torch.randn_like(x), torch.randn(2, heads, P, N))
            options = (64, True, 0.0, None)
            keep(name + " bwd", *op.ssd_scan_bwd(*grads, x, dt, A, B, C, D, z, bias, initial, None, *options))


def ssm(keep: Keep) -> None:
    op = torch.ops.n3
    for dtype in (*DTYPES, torch.int8, torch.float8_e4m3fn):
        inputs = dtype if dtype in DTYPES else torch.bfloat16
        # rows of whole tiles, of parts of one, and fewer than are updated together; rows that share random words
        for heads, groups, P, N in ((4, 2, 64, 128), (3, 1, 20, 96), (2, 2, 5, 7), (2, 1, 3, 21)):
            x, z = (torch.randn(2, 5, heads, P).to(inputs) for _ in range(2))
            B, C = (torch.randn(2, 5, groups, N).to(inputs) for _ in range(2))
            dt, A, bias = torch.randn(2, 5, heads), -torch.rand(heads) * 8, torch.randn(heads) - 2
            call = (x, dt, A, B, C, torch.randn(heads, P), z, bias)
            name, slots = f"ssm {dtype} {heads} {P} {N}", 12
            full = (30 * torch.randn(slots, heads, P, N)).to(dtype)
            scales = None if dtype in DTYPES else torch.rand(slots, heads, P)
            each = torch.arange(2, 12, dtype=torch.int32).view(2, 5)
            parents = torch.tensor([[-1, 0, 0, 2, 1], [-1, -1, 1, 1, 3]], dtype=torch.int32)
            for rounding in ("nearest", "stochastic"):
                for tree in (False, True):
                    state, scale = full.clone(), None if scales is None else scales.clone()
                    options = {"state_scale": scale, "seed": torch.tensor([3, 2**40]), "rounding": rounding}
                    where = (None, each) if tree else (None, None)
                    y = op.ssm_update(state, *call, *where, parents=parents if tree else None, **options)
                    keep(f"{name} {rounding} {tree}", y, state, *([] if scale is None else [scale]))
            if dtype not in DTYPES:
                continue
            ring = (torch.randn(2, 13, heads, P).to(dtype), torch.randn(2, 13, groups, N).to(dtype),
                    torch.rand(2, 13, heads))  # fmt: skip
            for tree in (False, True):
                state, pos = full.clone()[:2], torch.tensor([[9, 7], [4, 3]], dtype=torch.int32)  # one fold is due
                y = op.ssm_replay_update(state, *ring, pos, *call, parents=parents if tree else None)
                op.ssm_replay_commit(pos, *ring, torch.tensor([2, 3], dtype=torch.int32), 5)
                op.ssm_replay_flush(state, pos, *ring, A)
                keep(f"{name} replay {tree}", y, state, pos, *ring)


def mixer(keep: Keep) -> None:
    op = torch.ops.n3
    for dtype in DTYPES:
        for heads, groups, P, N in ((4, 2, 64, 128), (3, 1, 20, 21)):
            inner, channels = heads * P, heads * P + 2 * groups * N
            zxbcdt = torch.randn(2, 3, inner + channels + heads).to(dtype)
            weight, bias = torch.randn(channels, 4), torch.randn(channels)
            A, D, dt_bias = -torch.rand(heads) * 8, torch.randn(heads), torch.randn(heads) - 2
            for norm in (None, torch.randn(inner)):
                conv, state = torch.randn(2, channels, 3).to(dtype), torch.randn(2, heads, P, N)
                y = op.mamba2_decode(zxbcdt, weight, bias, conv, state, A, D, dt_bias, norm)
                keep(f"mamba2_decode {dtype} {heads} {P} {N} {norm is None}", y, conv, state)
                prompt = torch.randn(2, 70, inner + channels + heads).to(dtype)
                where = torch.tensor([1, 0])
                y = op.mamba2_prefill(prompt, weight, bias, conv, state, where, A, D, dt_bias, norm)
                keep(f"mamba2_prefill {dtype} {heads} {P} {N} {norm is None}", y, conv, state)


GROUPS = (gated_norm, conv1d, ssd_scan, ssm, mixer)  # of operators


def digests() -> dict[str, str]:
    import n3kernels
    from n3kernels import _host

    found = {"isa": _host.cpu_isa()}

    def keep(name: str, *tensors: torch.Tensor) -> None:
        data = b"".join(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
        found[name] = hashlib.sha256(data).hexdigest()

    with n3kernels.use_backend("cpu"):
        for group in GROUPS:
            torch.manual_seed(0)
            group(keep)
    return found


def test_every_instruction_set_gives_the_same_bits():
    from instruction_sets import assert_same_bits_on_every_set  # not where this module runs as a program

    assert_same_bits_on_every_set(__file__)


if __name__ == "__main__":
    for name, digest in digests().items():
        print(f"{name} = {digest}")
