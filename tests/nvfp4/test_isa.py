"""Every instruction set of the CPU kernels gives the same bits. The choice is made once per process, so run as a
program this file computes and prints digests: ``N3_CPU_ISA=generic python tests/nvfp4/test_isa.py``."""

from __future__ import annotations

import hashlib

import torch


def digests() -> dict[str, str]:
    import n3kernels
    from n3kernels import _host, nvfp4

    found = {"isa": _host.cpu_isa()}

    def keep(name: str, *tensors: torch.Tensor) -> None:
        data = b"".join(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
        found[name] = hashlib.sha256(data).hexdigest()

    torch.manual_seed(0)
    with n3kernels.use_backend("cpu"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            x = (torch.randn(37, 336) * torch.exp2(4 * torch.randn(37, 21, 1)).expand(37, 21, 16).flatten(1)).to(dtype)
            x[5, 7], x[6, 40] = float("nan"), 0.0
            for four_over_six in (False, True):
                t = nvfp4.quantize(x, four_over_six=four_over_six)
                keep(f"quantize {dtype} {four_over_six}", t.q, t.block_scale, t.global_scale)
            keep(f"dequantize {dtype}", t.dequantize(dtype).nan_to_num(7.0))
            w = nvfp4.quantize(torch.randn(53, 336))
            for m in (1, 3, 8, 40):
                keep(f"linear {dtype} {m}", nvfp4.linear(torch.randn(m, 336).to(dtype), w, torch.randn(53).to(dtype)))
            ids = torch.tensor([3, 0, 52])
            keep(f"embedding {dtype}", nvfp4.embedding(ids, w, dtype))
    return found


def test_every_instruction_set_gives_the_same_bits():
    from instruction_sets import assert_same_bits_on_every_set  # not where this module runs as a program

    assert_same_bits_on_every_set(__file__)


if __name__ == "__main__":
    for name, digest in digests().items():
        print(f"{name} = {digest}")
