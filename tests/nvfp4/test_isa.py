"""Every instruction set of the CPU kernels gives the same bits. The choice is made once per process, so run as a
program this file computes and prints digests: ``N3_CPU_ISA=generic python tests/nvfp4/test_isa.py``."""

from __future__ import annotations

import hashlib

import torch

SIGNS = torch.tensor([1.0, -1.0, -1.0, 1.0] * 4)
OPTIONS = {
    "nearest": {}, "four": {"four_over_six": True}, "mse": {"four_over_six": True, "metric": "mse"},
    "rows": {"per_row": True, "scale_layout": "128x4"}, "hadamard": {"hadamard": SIGNS},
    "hadamard of rows": {"hadamard": SIGNS, "per_row": True, "four_over_six": True},
    "stochastic": {"rounding": "stochastic", "seed": torch.tensor([2**40 + 7, 2**35 + 1])},
}  # fmt: skip
SQUARE = {f"16x16 {name}": {**options, "block": "16x16"} for name, options in OPTIONS.items() if "rows" not in name}


def quantize(x: torch.Tensor, **options) -> tuple[torch.Tensor, ...]:
    return torch.ops.n3.nvfp4_quantize.default(x, **options)


def produced(t) -> tuple[torch.Tensor, ...]:
    return t.q, t.block_scale, t.global_scale


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
            for name, options in OPTIONS.items():
                t = quantize(x, **options)
                keep(f"quantize {dtype} {name}", *t)
            # rows of tiles, with a rest behind the vectors; columns, which are read where they lie
            for name, options in (OPTIONS | SQUARE).items():
                square = x[:32] if "16x16" in str(options) else x
                keep(f"square {dtype} {name}", *quantize(square[..., 16:], **options))
                keep(f"columns {dtype} {name}", *quantize(square[:, :336].t().contiguous().mT, **options))
                keep(f"tall {dtype} {name}", *quantize(x.mT[:, :32], **options))
            t = nvfp4.quantize(x)
            for name, options in list(OPTIONS.items())[:4]:
                keep(f"relu2 {dtype} {name}", *produced(nvfp4.relu2_quantize(x, **options)))
                keep(f"silu_mul {dtype} {name}", *produced(nvfp4.silu_mul_quantize(x[:, :320], **options)))
                for residual in (None, x.float(), x):
                    normed = nvfp4.rms_norm_quantize(x, x[3], residual=residual, keep=True, **options)
                    tensors = [v.nan_to_num(7.0) for v in normed[1:] if v is not None]
                    kind = None if residual is None else residual.dtype
                    keep(f"rms_norm {dtype} {name} {kind}", *produced(normed[0]), *tensors)
            keep(f"dequantize {dtype}", t.dequantize(dtype).nan_to_num(7.0))
            w = nvfp4.quantize(torch.randn(53, 336))
            for m in (1, 3, 8, 40):
                keep(f"linear {dtype} {m}", nvfp4.linear(torch.randn(m, 336).to(dtype), w, torch.randn(53).to(dtype)))
            few = nvfp4.NVFP4Tensor.from_parts(w.q, w.block_scale.clone(), w.global_scale)
            few.block_scale.view(torch.uint8)[7:40:5, 2] = 1  # rows that are folded by tables of their own
            for m in (1, 3, 8, 40):
                x8 = torch.randn(m, 336).to(dtype)
                keep(f"linear fp8 {dtype} {m}", nvfp4.linear(x8, few, torch.randn(53).to(dtype), compute="fp8"))
            ids = torch.tensor([3, 0, 52])
            keep(f"embedding {dtype}", nvfp4.embedding(ids, w, dtype))
            a = nvfp4.quantize(torch.randn(40, 336))
            for m in (1, 3, 8, 40):
                rows = nvfp4.NVFP4Tensor.from_parts(a.q[:m], a.block_scale[:m], a.global_scale)
                keep(f"gemm {dtype} {m}", nvfp4.gemm(rows, w, dtype, torch.randn(53).to(dtype)))
                wide = nvfp4.NVFP4Tensor.from_parts(w.q[:48], w.block_scale[:48], w.global_scale)
                for activation, layout in ((None, "linear"), ("relu2", "128x4")):
                    t = nvfp4.gemm_quantize(rows, wide, torch.tensor(0.02), None, activation, scale_layout=layout)
                    keep(f"gemm_quantize {dtype} {m} {layout}", t.q, t.block_scale)
            offsets = torch.tensor([2, 2, 9, 40], dtype=torch.int32)
            keep(f"grouped_gemm {dtype}", nvfp4.grouped_gemm(a, nvfp4.NVFP4Tensor.stack([w, w, w]), offsets, dtype))
    return found


def test_every_instruction_set_gives_the_same_bits():
    from instruction_sets import assert_same_bits_on_every_set  # not where this module runs as a program

    assert_same_bits_on_every_set(__file__)


if __name__ == "__main__":
    for name, digest in digests().items():
        print(f"{name} = {digest}")
