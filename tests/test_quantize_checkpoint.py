"""``n3kernels quantize``: what it writes, byte for byte, for whom, and in how much memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import assert_same_bits
from dense_checkpoints import ATTENTION, INDEX, MLP, PACKED, command_line, read, tensors, write
from safetensors.torch import load_file
from torch import nn

from n3kernels import cli, nemotron, nvfp4, quantize_checkpoint, tiny
from n3kernels._recipes import choose, collapse, fused
from n3kernels._safetensors import Entry, read_header
from n3kernels.quantize_checkpoint import Job


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "src")


@pytest.fixture
def run(capsys, monkeypatch):
    return command_line(capsys, monkeypatch)

# ---------------------------------------------------------------- what is written


@pytest.mark.parametrize("piece", [2**25, 200])
@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-4over6"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bytes(tmp_path, monkeypatch, recipe, piece, dtype):
    """Each weight has the bytes that `quantize` gives it, or gives the concatenation of all that share its scale; in
    pieces of a few rows too."""
    monkeypatch.setattr(quantize_checkpoint, "PIECE", piece)
    dense = tensors(dtype)
    Job(write(tmp_path / "src", dense), recipe).run(tmp_path / "dst")
    got = read(tmp_path / "dst")
    expected = {name: t for name, t in dense.items() if name not in PACKED}
    for layer in range(2):
        at = f"model.layers.{layer}"
        for names in (ATTENTION[:3], ATTENTION[3:], MLP[:2], MLP[2:]):
            keys = [f"{at}.{'self_attn' if names[0] in ATTENTION else 'mlp'}.{name}.weight" for name in names]
            w = nvfp4.quantize(torch.cat([dense[key] for key in keys]), four_over_six=recipe == "nvfp4-4over6")
            sizes = [len(dense[key]) for key in keys]
            for key, q, scale in zip(keys, w.q.split(sizes), w.block_scale.split(sizes), strict=True):
                expected |= {key: q, f"{key}_scale": scale, f"{key}_scale_2": w.global_scale}
    assert got.keys() == expected.keys()
    for name, t in expected.items():
        assert_same_bits(got[name], t)


def test_files(source, tmp_path, run):
    code, out, err = run(source, tmp_path / "dst")
    dst = tmp_path / "dst"
    assert (code, err) == (0, "") and "14 weights packed" in out and " in 3 files" in out
    names = {path.name for path in dst.iterdir()}
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert names == {*shards, INDEX, "config.json", "hf_quant_config.json", "tokenizer.json"}
    index = json.loads((dst / INDEX).read_text())
    got = read(dst)
    assert index["weight_map"].keys() == got.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in got.values())
    for name, file in index["weight_map"].items():
        assert name in read_header(dst / file).tensors
    assert read_header(dst / min(shards)).metadata == {"format": "pt"}
    assert all(entry.start % torch.empty((), dtype=got[name].dtype).itemsize == 0
               for file in shards for name, entry in read_header(dst / file).tensors.items())  # fmt: skip
    config = json.loads((dst / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    ignore = ["lm_head", "model.embed_tokens", "model.layers.*.mlp.gate", "model.layers.*.odd"]
    ignore.insert(3, "model.layers.0.mixer.conv1d")
    assert quantization["quant_method"] == "modelopt" and quantization["quant_algo"] == "W4A16_NVFP4"
    assert sorted(quantization["ignore"]) == sorted(ignore)
    raw = json.loads((dst / "hf_quant_config.json").read_text())
    assert raw["quantization"]["exclude_modules"] == quantization["ignore"]
    assert raw["quantization"]["group_size"] == 16 and raw["producer"]["name"] == "n3kernels"


def test_one_file(tmp_path):
    Job(write(tmp_path / "src", shards=1), "nvfp4").run(tmp_path / "dst")
    assert not (tmp_path / "dst" / INDEX).exists() and len(read(tmp_path / "dst")) == len(tensors()) + 2 * len(PACKED)


def test_calibrated_activations(tmp_path):
    """Where every weight has a scale of its activations, the checkpoint is one for products of 4 bits by 4 bits."""
    content = tensors() | {name.replace("weight", "input_scale"): torch.tensor(0.1) for name in PACKED}
    job = Job(write(tmp_path / "src", content), "nvfp4")
    job.run(tmp_path / "dst")
    assert job.quantization()["quant_algo"] == "NVFP4"
    assert read(tmp_path / "dst")["model.layers.0.mlp.up_proj.input_scale"] == 0.1


def test_dry_run(source, tmp_path, run):
    code, out, err = run(source, tmp_path / "dst", "--dry-run", "--exclude", "*.o_proj")
    assert (code, err) == (0, "") and not (tmp_path / "dst").exists() and "nothing was written" in out
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip().startswith(("model", "lm_head"))}
    assert "NVFP4" in rows["model.layers.*.mlp.up_proj.weight"]
    assert "excluded" in rows["model.layers.*.self_attn.o_proj.weight"]
    assert "K = 24 is no multiple of 16" in rows["model.layers.*.odd.weight"]
    assert "kept by the recipe" in rows["lm_head.weight"]


# ---------------------------------------------------------------- which tensors


def entries(**shapes):
    return {name: Entry("BF16", shape, 0, 2 * torch.Size(shape).numel()) for name, shape in shapes.items()}


def test_the_recipe_of_nemotron():
    """As NVIDIA's Nano: attention, the Mamba layer before it, the latent projections and the MTP layer stay dense."""
    config = {"model_type": "nemotron_h", "vocab_size": 9, "hidden_size": 16, "hybrid_override_pattern": "MEM*-"}
    config |= {"n_routed_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    config |= {"moe_shared_expert_intermediate_size": 16, "intermediate_size": 16}
    packed = [
        "layers.0.mixer.in_proj", "layers.0.mixer.out_proj", "layers.1.mixer.experts.0.up_proj",
        "layers.1.mixer.experts.0.down_proj", "layers.1.mixer.shared_experts.up_proj", "layers.4.mixer.up_proj",
    ]  # fmt: skip
    kept = [
        "layers.2.mixer.in_proj", "layers.2.mixer.out_proj", "layers.3.mixer.q_proj", "layers.3.mixer.o_proj",
        "layers.1.mixer.fc1_latent_proj", "layers.1.mixer.gate", "embeddings",
    ]  # fmt: skip
    names = {f"backbone.{name}.weight": (16, 16) for name in (*packed, *kept)}
    names |= {"mtp.layers.1.mixer.experts.0.up_proj.weight": (16, 16), "lm_head.weight": (16, 16)}
    reasons = choose(entries(**names), config, [])
    chosen = [name for name, reason in reasons.items() if reason is None]
    assert chosen == [f"backbone.{name}.weight" for name in packed]
    (reason,) = choose(entries(**{"x.experts.up_proj": (4, 16, 16)}), config, []).values()
    assert "one tensor per expert" in reason


def test_weights_that_share_a_scale():
    layer = [f"l.{leaf}.weight" for leaf in ("k_proj", "v_proj", "q_proj", "o_proj", "up_proj", "gate_proj", "w1")]
    groups = fused([*layer, "m.up_proj.weight", "q_proj.weight"])
    assert groups["l.v_proj.weight"] == groups["l.q_proj.weight"] == tuple(f"l.{p}_proj.weight" for p in "qkv")
    assert groups["l.up_proj.weight"] == ("l.gate_proj.weight", "l.up_proj.weight")
    for name in ("m.up_proj.weight", "q_proj.weight", "l.w1.weight", "l.o_proj.weight"):
        assert groups[name] == (name,)


def test_collapse_names_no_packed_layer():
    kept = ["l.0.gate", "l.1.gate", "l.0.a", "l.2.a", "head", "m.0.e.0.u", "m.0.e.1.u"]
    assert collapse(kept, ["l.1.a", "l.1.up"]) == ["head", "l.*.gate", "l.0.a", "l.2.a", "m.*.e.*.u"]


# ---------------------------------------------------------------- the models read it


def dense_tiny() -> nemotron.Nemotron:
    """The shipped model with decoded weights."""
    model = nemotron.load(tiny.PATH, device="cpu", dtype=torch.bfloat16)
    for module in model.modules():
        buffers = dict(module.named_buffers(recurse=False))
        for name in [buffer.removesuffix("_scale_2") for buffer in buffers if buffer.endswith("_scale_2")]:
            parts = [getattr(module, name + suffix) for suffix in ("", "_scale", "_scale_2")]
            for suffix in ("", "_scale", "_scale_2"):
                delattr(module, name + suffix)
            setattr(module, name, nn.Parameter(nvfp4.NVFP4Tensor.from_parts(*parts).dequantize(), requires_grad=False))
    return model


@pytest.fixture(scope="module")
def tiny_checkpoints(tmp_path_factory):
    """The shipped model as bf16 in four shards, and what the command line makes of it."""
    folder = tmp_path_factory.mktemp("tiny")
    nemotron.save(dense_tiny(), folder / "whole")
    config = json.loads((folder / "whole" / "config.json").read_text())
    write(folder / "bf16", load_file(folder / "whole" / "model.safetensors"), 4, **config)
    assert cli.main(["quantize", str(folder / "bf16"), str(folder / "nvfp4")]) == 0
    return folder


def test_nemotron_reads_it(tiny_checkpoints):
    """The logits are those of the dense model with the same weights quantised in place."""
    model, got = dense_tiny(), nemotron.load(tiny_checkpoints / "nvfp4", device="cpu")
    model = model.float()
    packed = 0
    for name, module in got.named_modules():
        for leaf in ("weight", "up_proj", "down_proj"):
            if getattr(module, f"{leaf}_scale_2", None) is not None:
                mine, packed = model.get_submodule(name), packed + 1
                w = [nvfp4.quantize(t) for t in getattr(mine, leaf).data.view(-1, *getattr(mine, leaf).shape[-2:])]
                parts = [torch.stack(part) for part in zip(*(t[:3] for t in w), strict=True)]
                if leaf == "weight":
                    mine.set_nvfp4(*(part[0] for part in parts))
                else:
                    mine.set_nvfp4(leaf, *parts)
    assert packed == 16  # 3 x (2 sides of experts and 2 shared) and 2 x 2 projections of the Mamba layers
    ids = torch.tensor([tiny.encode("import os\n", bos=True)])
    assert_same_bits(got(ids), model(ids))


def test_transformers_reads_it(tiny_checkpoints):
    transformers = pytest.importorskip("transformers", minversion="5.21", reason="needs transformers >= 5.21")
    from n3kernels.integrations import transformers_nvfp4

    transformers_nvfp4.register_quantizers()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoints / "nvfp4", dtype=torch.float32)
    finally:
        transformers_nvfp4.unregister_quantizers()
    for module in model.modules():
        if hasattr(module, "time_step_limit"):  # clamped in transformers' prefill alone (docs/mamba.md)
            module.time_step_limit = (0.0, float("inf"))
    ids = torch.tensor([tiny.encode("def main(argv=None):\n", bos=True)])
    with torch.no_grad():
        want = nemotron.load(tiny_checkpoints / "nvfp4", device="cpu")(ids)
        torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- memory

MEASURE = """
import sys, torch
from pathlib import Path
from n3kernels import nvfp4, quantize_checkpoint

def megabytes(name):
    return int(Path("/proc/self/status").read_text().split(name + ":")[1].split()[0]) / 1024

quantize_checkpoint.PIECE = 2**20
nvfp4.quantize(torch.randn(64, 4096).bfloat16())
before = megabytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
quantize_checkpoint.Job(Path(sys.argv[1]), "nvfp4").run(Path(sys.argv[2]))
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from Linux's /proc")
def test_memory_does_not_grow_with_tensors(tmp_path):
    """A shard of 96 MB, with a tensor of 48 MB to pack and one of 48 MB to keep, through pieces of 1 MB."""
    big = torch.randn(1, 4096).bfloat16().repeat(6 * 2**10, 1)
    write(tmp_path / "src", {"m.up_proj.weight": big, "lm_head.weight": big.clone()}, 1)
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "src"), str(tmp_path / "dst")]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert 0 <= float(result.stdout) < 16, f"{result.stdout.strip()} MB more than before"
