"""NVFP4 checkpoints of both formats in transformers: loaded packed, with the values they stand for, and saved again."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import DEVICE, assert_same_bits
from packaging.version import Version

transformers = pytest.importorskip("transformers", minversion="5.21", reason="needs transformers >= 5.21")

import nvfp4_checkpoints as made  # noqa: E402
from nvfp4_checkpoints import (  # noqa: E402
    IGNORE,
    MODELS,
    QUANTIZATION,
    assert_same_logits,
    dense,
    from_pretrained,
    logits,
    modelopt,
    pack,
    packed_modules,
    read,
    write,
)

from n3kernels import nvfp4, tiny  # noqa: E402
from n3kernels.integrations import transformers as n3  # noqa: E402
from n3kernels.integrations import transformers_nvfp4 as loader  # noqa: E402
from n3kernels.integrations.transformers_nvfp4 import layers  # noqa: E402
from n3kernels.nemotron import load  # noqa: E402

saves = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="earlier versions save [1] as []"
)
both = pytest.mark.parametrize("fmt", list(QUANTIZATION))


@pytest.fixture(autouse=True)
def registered():
    loader.register_quantizers()
    yield
    n3.disable()


# ---------------------------------------------------------------- loading and saving


@both
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_memory(tmp_path, name, fmt):
    """The values of the stored weights, in 4.5 bits each, on n3's operators."""
    tensors, config = dense(name)
    stored, exact = pack(tensors, fmt)
    config["quantization_config"] = QUANTIZATION[fmt](IGNORE[fmt])
    model = from_pretrained(write(tmp_path / "packed", stored, config))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        logits(model)
    ran = {event.key for event in profile.key_averages()}
    assert ("n3::moe_experts" in ran) == (name != "Llama") and "n3::nvfp4_linear" in ran
    assert_same_logits(model, tmp_path / "dense", exact, {k: v for k, v in config.items() if "quant" not in k})

    weights = sum(t.numel() for key, t in tensors.items() if made.linear(key, t))
    count = sum(made.linear(key, t) is not None for key, t in tensors.items())
    held = sum(t.numel() * t.element_size() for module in packed_modules(model).values() for t in module.buffers())
    assert weights * 9 // 16 <= held <= weights * 9 // 16 + 12 * count  # scales of weight and activation, ready to use


@saves
@both
@pytest.mark.parametrize("name", MODELS)
def test_saved_again_it_is_what_it_was(tmp_path, name, fmt):
    tensors, config = dense(name)
    stored, _ = pack(tensors, fmt)
    config["quantization_config"] = QUANTIZATION[fmt](IGNORE[fmt])
    model = from_pretrained(write(tmp_path / "packed", stored, config))
    model.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = read(tmp_path / "again")
    assert again.keys() == stored.keys()
    for key, t in again.items():
        assert_same_bits(t, stored[key])
    raw = json.loads((tmp_path / "again" / "config.json").read_text())
    assert raw["quantization_config"] == config["quantization_config"]
    assert_same_bits(logits(from_pretrained(tmp_path / "again")), logits(model))


def test_four_over_six(tmp_path):
    tensors, config = dense("NemotronH")
    stored, exact = pack(tensors, four_over_six=True)
    raw = {**config, "quantization_config": modelopt(IGNORE["modelopt"])}
    model = from_pretrained(write(tmp_path / "packed", stored, raw))
    assert_same_logits(model, tmp_path / "dense", exact, config)


def test_hf_quant_config_alone(tmp_path):
    """Older exports say it beside ``config.json``."""
    tensors, config = dense("NemotronH")
    stored, exact = pack(tensors)
    folder = write(tmp_path / "packed", stored, config)
    inner = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": IGNORE["modelopt"]}
    raw = {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": inner}
    (folder / "hf_quant_config.json").write_text(json.dumps(raw))
    model = from_pretrained(folder)
    assert model.config.quantization_config.quant_method == "modelopt"
    assert_same_logits(model, tmp_path / "dense", exact, config)


def mixed(key, t):
    """As Super and Ultra: routed experts NVFP4, Mamba and shared experts FP8."""
    if any(part in key for part in ("in_proj.weight", "out_proj.weight", "shared_experts")):
        return "FP8"
    return "NVFP4" if ".experts." in key else None


def mixed_checkpoint(folder):
    tensors, config = dense("NemotronH")
    stored, exact = pack(tensors, scheme=mixed)
    for leaf in ("k_proj.k_scale", "v_proj.v_scale"):
        stored[f"backbone.layers.2.mixer.{leaf}"] = torch.tensor(0.25)
    algos = {"FP8": {"quant_algo": "FP8"}, "NVFP4": {"quant_algo": "NVFP4", "group_size": 16}}
    quantized = {key.removesuffix(".weight"): algos[mixed(key, t)] for key, t in tensors.items() if mixed(key, t)}
    raw = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": quantized, "ignore": []}
    return write(folder, stored, {**config, "quantization_config": raw}), stored, exact, config


@saves
def test_mixed_precision(tmp_path):
    """FP8 layers stay FP8; where there is no FP8 product they have the values of their decoded weights."""
    folder, stored, exact, config = mixed_checkpoint(tmp_path / "packed")
    model = from_pretrained(folder)
    kinds = [type(module) for module in packed_modules(model).values()]
    assert (kinds.count(layers.FP8Linear), kinds.count(layers.NVFP4Experts)) == (6, 2)
    if DEVICE == "cpu":
        assert_same_logits(model, tmp_path / "dense", exact, config)
    model.save_pretrained(tmp_path / "again")
    again = read(tmp_path / "again")
    assert again.keys() == stored.keys(), "static scales are kept for saving"
    for key, t in again.items():
        assert_same_bits(t, stored[key])


@pytest.mark.parametrize("static", [True, False])
def test_fp8_products(monkeypatch, static):
    """torch's scaled product of activations rounded to e4m3, which the CPU has too."""
    monkeypatch.setattr(layers, "_has_fp8", lambda device: True)
    torch.manual_seed(0)
    linear = torch.nn.Linear(32, 48).bfloat16()
    scale, x = torch.tensor(0.01), torch.randn(2, 5, 32).bfloat16()
    x[1, 2, 3] = 100.0  # beyond what the static scale allows for
    buffers = {"weight": (torch.float8_e4m3fn, (48, 32)), "weight_scale": (torch.float32, ())}
    buffers |= {"input_scale": (torch.float32, (1,))} if static else {}
    module = layers.FP8Linear(linear, buffers)
    module.weight, module.weight_scale = (linear.weight.float() / scale).to(torch.float8_e4m3fn), scale
    if static:
        module.input_scale = torch.tensor([0.02])
    module.finish("l", False)
    by = 0.02 if static else x.abs().amax().float() / 448
    codes = (x.float() / by).clamp(-448, 448).to(torch.float8_e4m3fn).double() * by
    with torch.no_grad():
        want = codes @ (module.weight.double() * 0.01).t() + linear.bias.double()
        torch.testing.assert_close(module(x).double(), want, rtol=1e-2, atol=1e-2)
        assert (module(x).double() - want).norm() < 4e-3 * want.norm()
        assert module(x[0, 0]).shape == (48,) and module(x[:0]).shape == (0, 5, 48)
        assert not module(torch.zeros_like(x)).isnan().any()


def test_embedding(tmp_path):
    """Nemotron-3-Nano-4B has its embedding in NVFP4."""
    tensors, config = dense("Llama")

    def scheme(key, t):
        return "NVFP4" if "embed_tokens" in key else None

    stored, exact = pack(tensors, scheme=scheme)
    raw = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}
    raw["quantized_layers"] = {"model.embed_tokens": {"quant_algo": "W4A16_NVFP4", "group_size": 16}}
    model = from_pretrained(write(tmp_path / "packed", stored, {**config, "quantization_config": raw}))
    assert isinstance(model.get_input_embeddings(), layers.NVFP4Embedding)
    assert_same_logits(model, tmp_path / "dense", exact, config)


def test_casting_leaves_packed_weights_alone(tmp_path):
    tensors, config = dense("Qwen3Moe")
    stored, _ = pack(tensors)
    folder = write(tmp_path, stored, {**config, "quantization_config": modelopt(["lm_head", "*.gate"])})
    model, cast = from_pretrained(folder), from_pretrained(folder).to(torch.bfloat16)
    for name, module in packed_modules(model).items():
        other = cast.get_submodule(name)
        for buffer, t in module.named_buffers():
            assert_same_bits(other.get_buffer(buffer), t)
    assert cast.lm_head.weight.dtype == torch.bfloat16
    assert (logits(cast) - logits(model)).norm() < 0.05 * logits(model).norm()


@pytest.mark.parametrize("name", ["Mixtral", "NemotronH"])
def test_other_weights_take_their_scales_along(tmp_path, name):
    """`load_state_dict` on a loaded model, which keeps products of the stored scales."""
    tensors, config = dense(name)
    raw = {**config, "quantization_config": modelopt(IGNORE["modelopt"])}
    model = from_pretrained(write(tmp_path / "a", pack(tensors)[0], raw))
    torch.manual_seed(1)
    others = {key: t * 2 * torch.rand(()) if made.linear(key, t) else t for key, t in tensors.items()}
    other = from_pretrained(write(tmp_path / "b", pack(others)[0], raw))
    assert not torch.equal(logits(other), logits(model))
    model.load_state_dict(other.state_dict())
    assert_same_bits(logits(model), logits(other))


def test_generation_and_the_shipped_model():
    """transformers and n3kernels.nemotron read the same checkpoint alike, and continue a prompt alike."""
    n3.enable("nemotron_h")
    model, ours = from_pretrained(tiny.PATH), load(tiny.PATH, dtype=torch.float32, device=DEVICE)
    ids = torch.tensor([tiny.encode("import os\nimport sys\n\n\ndef main(", bos=True)])
    with torch.no_grad():
        want = ours(ids.to(DEVICE))
    torch.testing.assert_close(logits(model, ids), want, rtol=1e-4, atol=1e-4)
    out = model.generate(ids.to(DEVICE), max_new_tokens=12, do_sample=False)
    with torch.no_grad():
        greedy = ours(out)[0].argmax(-1)
    assert out.shape[1] == ids.shape[1] + 12 and (out[0, ids.shape[1] :] == greedy[ids.shape[1] - 1 : -1]).all()


# ---------------------------------------------------------------- several layers in one


def test_gate_and_up_of_their_own_scales(tmp_path):
    """Experts of which gate and up have other global scales, one of them 0, are what their weights say."""
    tensors, config = dense("Mixtral")
    tensors = {key: t * (3.0 if ".w3." in key else 1.0) for key, t in tensors.items()}
    tensors["model.layers.0.block_sparse_moe.experts.2.w1.weight"].zero_()
    stored, exact = pack(tensors)
    for expert, side in ((2, "w1"), (3, "w3")):
        stored[f"model.layers.0.block_sparse_moe.experts.{expert}.{side}.weight_scale_2"] = torch.tensor(0.0)
        exact[f"model.layers.0.block_sparse_moe.experts.{expert}.{side}.weight"].zero_()
    ones = [stored[f"model.layers.1.block_sparse_moe.experts.0.{side}.weight_scale_2"] for side in ("w1", "w3")]
    assert ones[0] != ones[1]
    folder = write(tmp_path / "packed", stored, {**config, "quantization_config": modelopt(["lm_head", "*.gate"])})
    assert_same_logits(from_pretrained(folder), tmp_path / "dense", exact, config)


@pytest.fixture
def fused_phi3():
    """Phi-3 of checkpoints that keep q, k, v and gate, up apart: transformers joins them when it loads."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Concatenate, WeightConverter

    qkv = [f"self_attn.{leaf}_proj.weight" for leaf in "qkv"]
    gate_up = ["mlp.gate_proj.weight", "mlp.up_proj.weight"]
    conversion_mapping.register_checkpoint_conversion_mapping("phi3", [
        WeightConverter(qkv, "self_attn.qkv_proj.weight", [Concatenate(dim=0)]),
        WeightConverter(gate_up, "mlp.gate_up_proj.weight", [Concatenate(dim=0)]),
    ], overwrite=True)  # fmt: skip
    yield
    conversion_mapping._checkpoint_conversion_mapping_cache.pop("phi3")
    conversion_mapping.USER_REGISTERED_MAPPINGS.discard("phi3")


@saves
@both
def test_fused_linear_layers(tmp_path, fmt, fused_phi3):
    """Each part keeps its own global scale, and is saved as it was."""
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**made.LLAMA))
    tensors = {}
    parts = {"qkv_proj": ([64, 32, 32], "qkv"), "gate_up_proj": ([48, 48], ("gate", "up"))}
    for key, t in model.state_dict().items():
        fused = key.split(".")[-2]
        sizes, leaves = parts.get(fused, ([len(t)], [fused.removesuffix("_proj")]))
        for leaf, part in zip(leaves, t.split(sizes), strict=True):
            tensors[key.replace(fused, f"{leaf}_proj") if fused in parts else key] = part.clone()
    config = {**model.config.to_dict(), "architectures": ["Phi3ForCausalLM"]}
    stored, exact = pack(tensors, fmt)
    raw = {**config, "quantization_config": QUANTIZATION[fmt](IGNORE[fmt])}
    packed = from_pretrained(write(tmp_path / "packed", stored, raw))
    assert packed.model.layers[0].self_attn.qkv_proj.rows == (64, 32, 32)
    assert_same_logits(packed, tmp_path / "dense", exact, config)
    packed.save_pretrained(tmp_path / "again")
    again = read(tmp_path / "again")
    assert again.keys() == stored.keys()
    for key, t in again.items():
        assert_same_bits(t, stored[key])


def test_equal_scales_are_one_product():
    linear = torch.nn.Linear(32, 24, bias=True)
    w = nvfp4.quantize(linear.weight.detach())
    buffers = {"weight": (torch.uint8, (24, 16)), "weight_scale": (torch.float8_e4m3fn, (24, 2))}
    module = layers.NVFP4Linear(linear, layers.MODELOPT, {**buffers, "weight_scale_2": (torch.float32, (2,))}, (16, 8))
    module.weight, module.weight_scale, module.weight_scale_2 = w.q, w.block_scale, w.global_scale.expand(2)
    x = torch.randn(3, 32)
    for factor in (1.0, 2.0):
        module.weight_scale_2 = w.global_scale * torch.tensor([1.0, factor])
        module.finish("l", False)
        assert module.rows == ((24,) if factor == 1 else (16, 8))
        rows = torch.tensor([1.0] * 16 + [factor] * 8)[:, None]
        want = torch.nn.functional.linear(x, w.dequantize(torch.float32) * rows, linear.bias)
        torch.testing.assert_close(module(x), want, rtol=1e-5, atol=1e-5)
