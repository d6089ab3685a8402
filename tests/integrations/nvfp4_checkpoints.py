"""Small checkpoints in the formats that store NVFP4, each beside a dense one of equal values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from conftest import DEVICE
from safetensors.torch import load_file, save_file

from n3kernels import nvfp4
from n3kernels.integrations.transformers_nvfp4 import layers

SHARED = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SHARED |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
NEMOTRON = {
    **SHARED, "intermediate_size": 48, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16,
    "chunk_size": 16, "hybrid_override_pattern": "ME*-E", "moe_intermediate_size": 48, "moe_latent_size": 16,
    "moe_shared_expert_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 3,
}  # fmt: skip
LLAMA = {**SHARED, "num_hidden_layers": 2, "intermediate_size": 48}
QWEN = {
    **SHARED, "num_hidden_layers": 2, "intermediate_size": 48, "moe_intermediate_size": 16, "num_experts": 6,
    "num_experts_per_tok": 2, "decoder_sparse_step": 1,
}  # fmt: skip
MODELS = {"NemotronH": NEMOTRON, "Llama": LLAMA, "Qwen3Moe": QWEN, "Mixtral": {**LLAMA, "num_local_experts": 6}}
IDS = torch.randint(3, 96, (2, 21), generator=torch.Generator().manual_seed(1))
KEPT = ("lm_head", "embed", "norm", "gate.weight", "conv1d", "latent_proj")

NAMES = {
    "modelopt": ("weight", "weight_scale", "weight_scale_2", "input_scale"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"),
}


def dense(name: str, **changes) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors as a hub checkpoint has them (experts one by one), and the configuration."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**MODELS[name], **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    from transformers.core_model_loading import revert_weight_conversion

    tensors = revert_weight_conversion(model, model.state_dict())
    raw = {**config.to_dict(), "architectures": [f"{name}ForCausalLM"]}
    return {key: t.clone().contiguous() for key, t in tensors.items()}, raw


def linear(key: str, t: torch.Tensor) -> str | None:
    """The recipe of these tests: every linear weight, and none of what checkpoints keep."""
    return "NVFP4" if key.endswith(".weight") and t.dim() == 2 and not any(part in key for part in KEPT) else None


def pack(
    tensors: dict[str, torch.Tensor], fmt: str = "modelopt", scheme: Callable = linear, four_over_six: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The checkpoint's tensors, and dense ones of the very values they stand for."""
    stored, exact = {}, {}
    for key, t in tensors.items():
        kind, layer = scheme(key, t), key.removesuffix(".weight")
        stored[key] = exact[key] = t
        if kind == "NVFP4":
            del stored[key]
            w = nvfp4.quantize(t.float(), four_over_six=four_over_six)
            scale, activations = w.global_scale, torch.tensor(0.5)
            if fmt != "modelopt":  # stores the inverse, whose inverse is what counts
                scale, activations = (1 / w.global_scale).reshape(1), torch.tensor([2.0])
                w = w._replace(global_scale=(1 / scale).reshape(()))
            exact[key] = w.dequantize(torch.float32)
            parts = (w.q, w.block_scale, scale, activations)
            stored |= {f"{layer}.{leaf}": part.clone() for leaf, part in zip(NAMES[fmt], parts, strict=True)}
        elif kind == "FP8":
            scale = t.abs().amax() / 448
            stored[key] = (t / scale).to(torch.float8_e4m3fn)
            stored[f"{layer}.weight_scale"], exact[key] = scale, stored[key].float() * scale
            stored[f"{layer}.input_scale"] = torch.tensor(0.02)
    return stored, exact


def modelopt(ignore: list[str], **more) -> dict:
    return {
        "quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ignore,
        "producer": {"name": "modelopt", "version": "0.44.0"},
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float"}}}, **more,
    }  # fmt: skip


def compressed(ignore: list[str], **more) -> dict:
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    group = {"format": "nvfp4-pack-quantized", "targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ignore, "kv_cache_scheme": None, **more,
    }  # fmt: skip


IGNORE = {
    "modelopt": ["lm_head", "*.gate", "*latent_proj", "*conv1d"],
    "compressed-tensors": ["lm_head", r"re:.*\.gate$", "re:.*latent_proj$", "re:.*conv1d$"],
}
QUANTIZATION = {"modelopt": modelopt, "compressed-tensors": compressed}


def write(folder: Path, tensors: dict[str, torch.Tensor], config: dict, shards: int = 3) -> Path:
    """A folder as the hub has it: shards, their index, ``config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    names, weight_map = list(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        part = {name: tensors[name].contiguous() for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder."""
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def from_pretrained(folder, **options):
    options = {"dtype": torch.float32, **options}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).to(DEVICE)
    for module in model.modules():  # transformers clamps dt in its prefill alone (docs/mamba.md)
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids.to(DEVICE)).logits.float()


def assert_same_logits(model, folder: Path, exact: dict, config: dict, tolerance: float = 1e-5):
    want = logits(from_pretrained(write(folder, exact, config)))
    got = logits(model)
    assert (got - want).norm() <= tolerance * want.norm()


def packed_modules(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, layers.Packed)}
