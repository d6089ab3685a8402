"""Every instruction set of the routing kernels gives the same bits, and so does every number of threads. The choice of
instructions is made once per process, so run as a program this file computes and prints digests:
``N3_CPU_ISA=generic python tests/moe/test_route_isa.py``."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys

import pytest
import torch

SETS = ("generic", "avx2", "avx512")
# experts, top_k, groups: whole columns of 64 experts, parts of one, fewer than lanes, as many chosen as there are
SHAPES = ((512, 22, 1), (896, 16, 7), (256, 8, 8), (67, 32, 1), (130, 6, 13), (5, 3, 1), (1, 1, 1), (32, 32, 1))


def logits_of(kind: str, experts: int) -> torch.Tensor:
    """Rows that are easy, rows of ties and near-ties, and rows that are not numbers."""
    x = torch.randn(9, experts)
    if kind == "ties":
        x = x.round()
    elif kind == "near ties":  # neighbouring floats
        x = torch.nextafter(torch.full_like(x, 0.75), torch.full_like(x, math.inf)).where(x > 0, 0.75)
    elif kind == "saturated":
        x = 100 * x
    elif kind == "bad":
        bad = torch.tensor([math.nan, math.inf, -math.inf, 1e-40, -0.0])[torch.randint(5, x.shape)]
        x = bad.where(torch.rand(x.shape) < 0.3, x)
    return x


KINDS = ("plain", "ties", "near ties", "saturated", "bad")


def results():
    """Names and tensors, forward and backward."""
    op = torch.ops.n3
    for experts, top_k, groups in SHAPES:
        bias = torch.randn(experts) / 4
        for kind in KINDS:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                x = logits_of(kind, experts).to(dtype)
                for score in ("sigmoid", "softmax"):
                    for b in (bias, None):
                        options = {"top_k": top_k, "score": score, "scale": 2.5}
                        most = {"n_group": groups, "topk_group": -(-groups // 2)} if groups > 1 else {}
                        ids, weights, counts, flags = op.moe_route(x, b, **options, **most)
                        name = f"{experts} {top_k} {kind} {dtype} {score} {b is None}"
                        yield name, (ids, weights, counts, flags)
                        grad = op.moe_route_bwd(torch.randn(weights.shape), x, ids, score=score, scale=2.5)
                        yield name + " bwd", (grad,)


def digests(threads: int = 1) -> dict[str, str]:
    import n3kernels
    from n3kernels import _host

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    found = {"isa": _host.cpu_isa()}
    with n3kernels.use_backend("cpu"):
        for name, tensors in results():
            data = b"".join(t.reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
            found[name] = hashlib.sha256(data).hexdigest()
    torch.set_num_threads(before)
    return found


def run(isa: str) -> dict[str, str]:
    env = {**os.environ, "N3_CPU_ISA": isa}
    out = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return dict(line.split(" = ") for line in out.stdout.splitlines())


def test_every_instruction_set_gives_the_same_bits():
    pytest.importorskip("n3kernels._host", reason="_host, which names the instruction set, is of another Python")
    found = {result.pop("isa"): result for result in map(run, SETS)}  # a machine without one falls back to the next
    first = found.pop("generic")
    for result in found.values():
        assert result == first


def test_the_ids_are_those_of_the_definition():
    """Bit for bit, ties and near-ties included; and the estimates of the kernel show in nothing."""
    import n3kernels
    from n3kernels.moe import reference

    torch.manual_seed(0)
    for experts, top_k, groups in SHAPES:
        bias = torch.randn(experts) / 4
        for kind in KINDS:
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                x = logits_of(kind, experts).to(dtype)
                for b in (bias, None, 1e4 * bias, 1e-7 * bias):
                    options = {"top_k": top_k, "n_group": groups, "topk_group": -(-groups // 2)}
                    with n3kernels.use_backend("cpu"):
                        mine = torch.ops.n3.moe_route(x, b, **options)
                    truth = reference.moe_route(x, b, **options)
                    for a, c in zip((mine[0], *mine[2:]), (truth[0], *truth[2:]), strict=True):
                        assert torch.equal(a, c), (experts, top_k, kind, dtype)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_does_not_show(threads):
    """Enough rows and slots for every thread to have a part."""
    import n3kernels

    torch.manual_seed(0)
    x, bias = torch.randn(500, 512), torch.randn(512) / 4
    slots = torch.randint(-1, 70, (9001, 6), dtype=torch.int32)
    before = torch.get_num_threads()

    def run(threads):
        torch.set_num_threads(threads)
        ids, *rest = torch.ops.n3.moe_route(x, bias, top_k=22)
        grad = torch.ops.n3.moe_route_bwd(torch.ones(500, 22), x, ids, score="softmax")
        return ids, *rest, grad, *torch.ops.n3.moe_sort(slots, 64, 3)

    with n3kernels.use_backend("cpu"):
        one, several = run(1), run(threads)
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


if __name__ == "__main__":
    for name, digest in digests().items():
        print(f"{name} = {digest}")
