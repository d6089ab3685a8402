"""Models on n3's operators outside of eager Python: torch.export, AOTInductor, and a C++ program linked with torch."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import DEVICE, assert_same_bits
from torch import nn

import n3kernels
from n3kernels.nemotron import Config
from n3kernels.nemotron.layers import Mamba2, MoE
from n3kernels.nvfp4 import quantize

CONFIG = Config(
    layers=("mamba", "moe"), mtp_layers=(), num_nextn_predict_layers=0, vocab_size=320, hidden_size=64,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=32,
    n_groups=2, conv_kernel=4, chunk_size=64, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
    moe_latent_size=32, moe_shared_expert_intermediate_size=64, eos_token_ids=(2,),
)  # fmt: skip
EXAMPLE = Path(__file__).parent.parent / "examples" / "cpp"


class Block(nn.Module):
    """A Mamba-2 mixer, one of its projections in NVFP4, and a mixture of experts."""

    def __init__(self):
        super().__init__()
        self.mixer, self.moe = Mamba2(CONFIG), MoE(CONFIG)
        torch.manual_seed(0)
        for p in self.parameters():
            nn.init.normal_(p, std=0.1)
        self.mixer.out_proj.set_nvfp4(*quantize(self.mixer.out_proj.weight)[:3])
        self.eval().requires_grad_(False).to(DEVICE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.mixer(x, None, 0)
        return y + self.moe(y)


class Decode(nn.Module):
    """One token against states in slots, which the operator writes in place."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x, conv_state, ssm_state, slots):
        m = self.block.mixer
        return torch.ops.n3.mamba2_decode.default(
            m.in_proj(x), m.conv1d.weight.squeeze(1), m.conv1d.bias, conv_state, ssm_state, *m._weights(),
            m.norm.weight, slots, eps=m.norm.eps,
        )  # fmt: skip


def decode_inputs() -> tuple[torch.Tensor, ...]:
    c = CONFIG
    torch.manual_seed(1)
    shapes = ((2, c.hidden_size), (3, c.conv_dim, 3), (3, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size))
    return *(torch.randn(shape, device=DEVICE) for shape in shapes), torch.tensor([2, 0], device=DEVICE)


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if str(node.target).startswith("n3.")}


def test_export_keeps_the_operators():
    x = torch.randn(2, 70, 64, device=DEVICE)
    tokens = torch.export.Dim("tokens", min=32, max=4096)
    block = Block()
    program = torch.export.export(block, (x,), dynamic_shapes=({1: tokens},))
    assert operators(program) == {
        "n3.causal_conv1d.default", "n3.ssd_scan.default", "n3.gated_rms_norm.default", "n3.nvfp4_linear.default",
        "n3.moe_route.default", "n3.moe_experts.default",
    }  # fmt: skip
    for length in (70, 129):
        x = torch.randn(2, length, 64, device=DEVICE)
        assert_same_bits(program.module()(x), block(x))


def test_export_of_operators_that_write_their_states(tmp_path):
    module, inputs, twins = Decode(), decode_inputs(), decode_inputs()
    program = torch.export.export(module, inputs)
    assert operators(program) == {"n3.mamba2_decode.default"}
    torch.export.save(program, tmp_path / "decode.pt2")
    loaded = torch.export.load(tmp_path / "decode.pt2").module()
    assert_same_bits(loaded(*inputs), module(*twins))
    for state, twin in zip(inputs, twins, strict=True):
        assert_same_bits(state, twin)


def compiled(block: Block, x: torch.Tensor, path: Path) -> str:
    return torch._inductor.aoti_compile_and_package(torch.export.export(block, (x,)), package_path=str(path))


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    block, x = Block(), torch.randn(2, 70, 64, device=DEVICE)
    model = torch._inductor.aoti_load_package(compiled(block, x, tmp_path / "block.pt2"))
    assert_same_bits(model(x), block(x))

    module, inputs, twins = Decode(), decode_inputs(), decode_inputs()
    program = torch.export.export(module, inputs)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "decode.pt2"))
    assert_same_bits(torch._inductor.aoti_load_package(package)(*inputs), module(*twins))
    for state, twin in zip(inputs, twins, strict=True):
        assert_same_bits(state, twin)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE != "cpu", reason="the example runs on the CPU")
def test_a_cpp_program_calls_the_operators(tmp_path):
    if not shutil.which("cmake"):
        pytest.skip("cmake is not installed")
    block, x = Block(), torch.ones(1, 8, 64)
    package = compiled(block, x, tmp_path / "block.pt2")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    subprocess.run(["cmake", "-S", EXAMPLE, "-B", tmp_path / "build", prefix], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", tmp_path / "build"], check=True, capture_output=True)
    library = Path(n3kernels.__file__).parent / "_C.so"
    run = [tmp_path / "build" / "n3_from_cpp", library, package]
    out = subprocess.run(run, check=True, capture_output=True, text=True).stdout.splitlines()
    assert out[0].startswith("nvfp4_linear [4, 96], 13824 bytes of weights"), out
    assert 0.05 < float(out[0].split()[-1]) < 0.2
    assert out[1].startswith("model [1, 8, 64] sum ")
    assert float(out[1].split()[-1]) == pytest.approx(block(x).sum().item(), abs=1e-3)
