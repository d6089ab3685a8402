"""Small dense checkpoints for `n3kernels quantize`, and what its tests share."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from n3kernels import cli

INDEX = "model.safetensors.index.json"
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


def tensors(dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    """A small transformer of no model in particular."""
    torch.manual_seed(0)
    out = {"model.embed_tokens.weight": torch.randn(50, 32), "lm_head.weight": torch.randn(50, 32)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        for i, leaf in enumerate(ATTENTION):
            rows = {"q_proj": 32, "o_proj": 17}.get(leaf, 16)
            out[f"{at}.self_attn.{leaf}.weight"] = torch.randn(rows, 32) * (i + 1)
        for i, leaf in enumerate(MLP):
            out[f"{at}.mlp.{leaf}.weight"] = torch.randn(*((32, 48) if leaf == "down_proj" else (48, 32))) / (i + 1)
        out[f"{at}.mlp.gate.weight"] = torch.randn(4, 32)
        out[f"{at}.input_layernorm.weight"] = torch.randn(32)
        out[f"{at}.odd.weight"] = torch.randn(8, 24)
    out["model.layers.0.mixer.conv1d.weight"] = torch.randn(16, 1, 4)
    out["model.layers.0.self_attn.o_proj.bias"] = torch.randn(16)
    return {name: t.to(dtype) for name, t in out.items()}


PACKED = [f"model.layers.{i}.{leaf}.weight" for i in range(2)
          for leaf in (*(f"self_attn.{p}" for p in ATTENTION), *(f"mlp.{p}" for p in MLP))]  # fmt: skip


def write(folder: Path, content=None, shards: int = 3, **config) -> Path:
    """A checkpoint of several shards with an index and the files that lie beside it."""
    folder.mkdir(exist_ok=True)
    content, weight_map = content or tensors(), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = dict(list(content.items())[i::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["X"], **config}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def same_files(a: Path, b: Path) -> None:
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    for path in a.iterdir():
        assert path.read_bytes() == (b / path.name).read_bytes(), path.name


def command_line(capsys, monkeypatch):
    """`n3kernels quantize` in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*argv):
        code = cli.main(["quantize", *map(str, argv)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def refused(result, message):
    assert result == (2, "", f"n3kernels: {message}\n")
