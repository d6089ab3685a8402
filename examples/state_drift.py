"""How far a Mamba-2 state stored in fewer bits drifts from the exact one over a long decode.

    python examples/state_drift.py                  # 100 000 tokens, a few minutes on one core
    python examples/state_drift.py --steps 4096
    python examples/state_drift.py --json benchmarks/results/state_drift.json    # for the plot in docs/gallery.md

Decodes token by token on the CPU kernels, once for each way to store the state: `ssm_update` rounds it after every
token, `ssm_replay_update` with a ring of 32 tokens once in 31. Beside them runs the recurrence in float64 on the same
inputs. Prints a markdown table: the RMS error of y relative to the RMS of y, over the last 512 tokens, for three heads
that remember about 640, 76 and 2 tokens. x, B and C are the SiLU of independent normal numbers, as they come out of the
convolution, and dt is log-normal; all are float32, so that nothing but the state is rounded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from n3kernels import use_backend
from n3kernels.mamba import ssm_replay_commit, ssm_replay_update, ssm_update

MEMORY = (640, 76, 2)  # tokens after which a head has forgotten all but 1/e, on average
HEAD_DIM, D_STATE, RING = 64, 128, 32
SCALED = (torch.int8, torch.float8_e4m3fn)
EVERY_TOKEN = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
IN_A_RING = (torch.float32, torch.bfloat16, torch.float16)


class EveryToken:
    """`ssm_update`: the state is rounded after every token."""

    def __init__(self, dtype: torch.dtype, rounding: str):
        heads = len(MEMORY)
        self.state = torch.zeros(1, heads, HEAD_DIM, D_STATE).to(dtype)
        self.scale = torch.zeros(1, heads, HEAD_DIM) if dtype in SCALED else None
        self.rounding, self.seed = rounding, torch.tensor([2026, 0])
        self.name = f"{str(dtype).removeprefix('torch.')}, {rounding}"

    def __call__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        options = {"state_scale": self.scale, "seed": self.seed, "rounding": self.rounding, "dt_softplus": False}
        y = ssm_update(self.state, x, dt, A, B, C, **options)
        self.seed[1] += 1
        return y


class InARing:
    """`ssm_replay_update`: the state is rounded, to nearest, when the ring is full."""

    def __init__(self, dtype: torch.dtype):
        heads = len(MEMORY)
        self.state = torch.zeros(1, heads, HEAD_DIM, D_STATE, dtype=dtype)
        self.x, self.B = torch.zeros(1, RING, heads, HEAD_DIM), torch.zeros(1, RING, 1, D_STATE)
        self.dt, self.pos = torch.zeros(1, RING, heads), torch.zeros(1, 2, dtype=torch.int32)
        self.accepted = torch.ones(1, dtype=torch.int32)
        self.name = f"{str(dtype).removeprefix('torch.')}, ring of {RING}"

    def __call__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        ring = self.x, self.B, self.dt
        y = ssm_replay_update(self.state, *ring, self.pos, x, dt, A, B, C, dt_softplus=False)
        ssm_replay_commit(self.pos, *ring, self.accepted, tokens=1)
        return y


class Exact:
    """The recurrence in float64."""

    def __init__(self):
        self.state = torch.zeros(len(MEMORY) * HEAD_DIM, D_STATE, dtype=torch.float64)

    def __call__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        x, dt, A, B, C = (t.double() for t in (x[0], dt[0], A, B[0, 0], C[0, 0]))
        self.state *= torch.exp(A * dt).repeat_interleave(HEAD_DIM)[:, None]
        self.state.addr_((dt[:, None] * x).flatten(), B)
        return self.state.mv(C).view(1, len(MEMORY), HEAD_DIM)


def ways_to_store() -> list:
    every = [EveryToken(dtype, "nearest") for dtype in EVERY_TOKEN]
    every += [EveryToken(dtype, "stochastic") for dtype in EVERY_TOKEN if dtype != torch.float32]
    return sorted(every, key=lambda way: EVERY_TOKEN.index(way.state.dtype)) + [InARing(d) for d in IN_A_RING]


def drift(ends: list[int], window: int) -> dict[str, list[list[float]]]:
    """Name of a way -> for each of ``ends`` the error of each head over the ``window`` tokens before it."""
    generator = torch.Generator().manual_seed(0)
    A = -torch.tensor([1.0, 4.0, 16.0])
    mean_dt = 1 / (-A * torch.tensor(MEMORY))
    ways, exact, heads = ways_to_store(), Exact(), len(MEMORY)
    square = torch.zeros(len(ends), heads, dtype=torch.float64)
    errors = {way.name: torch.zeros_like(square) for way in ways}
    for first in range(0, max(ends), 256):
        x = F.silu(torch.randn(256, 1, heads, HEAD_DIM, generator=generator))
        dt = mean_dt * torch.exp(0.5 * torch.randn(256, 1, heads, generator=generator) - 0.125)  # of mean mean_dt
        B, C = F.silu(torch.randn(2, 256, 1, 1, D_STATE, generator=generator))
        for t in range(first, min(first + 256, max(ends))):
            token = x[t - first], dt[t - first], A, B[t - first], C[t - first]
            truth = exact(*token)
            outputs = {way.name: way(*token) for way in ways}
            for e in [e for e, end in enumerate(ends) if end - window <= t < end]:
                square[e] += truth.square().sum((0, 2))
                for name, y in outputs.items():
                    errors[name][e] += (y - truth).square().sum((0, 2))
    return {name: (error / square).sqrt().tolist() for name, error in errors.items()}


def short(error: float) -> str:
    return f"{error:.1e}".replace("e-0", "e-").replace("e+00", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100_000, help="tokens to decode")
    parser.add_argument("--window", type=int, default=512, help="the error is that of so many last tokens")
    parser.add_argument("--json", type=Path, help="also measure at every power of two, and write all of it there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shown = sorted({min(4096, args.steps), args.steps})
    between = [1 << e for e in range(9, 20) if args.json and 1 << e < args.steps]
    ends = sorted({*shown, *between})
    with use_backend("cpu"):
        table = drift(ends, args.window)
    if args.json:
        from n3kernels.benchmarks import facts

        facts.keep(args.json, {"memory": list(MEMORY), "window": args.window, "tokens": ends, "error": table})
    print("| state | " + " | ".join(f"after {end} tokens" for end in shown) + " |")
    print("|---" * (1 + len(shown)) + "|")
    for name, errors in table.items():
        cells = [" / ".join(short(error) for error in errors[ends.index(end)]) for end in shown]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
