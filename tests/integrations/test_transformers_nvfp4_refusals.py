"""What NVFP4 checkpoints are refused for in transformers, and what is left to transformers."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.21", reason="needs transformers >= 5.21")

import nvfp4_checkpoints as made  # noqa: E402
from nvfp4_checkpoints import dense, from_pretrained, logits, modelopt, pack, packed_modules, write  # noqa: E402

from n3kernels.integrations import transformers as n3  # noqa: E402
from n3kernels.integrations import transformers_nvfp4 as loader  # noqa: E402
from n3kernels.nemotron import CheckpointError  # noqa: E402


@pytest.fixture(autouse=True)
def registered():
    loader.register_quantizers()
    yield
    n3.disable()


LAYER = "model.layers.0.mlp.up_proj"


def llama(folder, change=lambda stored: None, **config):
    tensors, raw = dense("Llama")
    stored, _ = pack(tensors)
    change(stored)
    return write(folder, stored, {**raw, "quantization_config": {**modelopt(["lm_head"]), **config}})


def put(leaf, value):
    return lambda stored: stored.update({f"{LAYER}.{leaf}": value})


def narrow(shape, dtype=torch.uint8):
    return torch.zeros(shape).to(dtype)


BAD_TENSORS = [
    (lambda stored: stored.pop(f"{LAYER}.weight_scale"),
     f"{LAYER}.weight_scale is missing; there are input_scale, weight, weight_scale_2"),
    (lambda stored: stored.pop(f"{LAYER}.weight_scale_2"),
     f"{LAYER}.weight_scale_2 is missing; there are input_scale, weight, weight_scale"),
    (put("weight_scale", torch.ones(48, 2)), f"{LAYER}.weight_scale must be F8_E4M3 [48, 2], got F32 [48, 2]"),
    (put("weight_scale", narrow((48, 4), torch.float8_e4m3fn)),
     f"{LAYER}.weight_scale must be F8_E4M3 [48, 2], got F8_E4M3 [48, 4]"),
    (put("weight_scale_2", torch.ones(2)), f"{LAYER}.weight_scale_2 must be F32 of 1 element, got F32 [2]"),
    (put("pre_quant_scale", torch.ones(32)), f"{LAYER}.pre_quant_scale is not served beside a packed weight"),
    (put("weight", narrow((48, 12))), f"{LAYER}: NVFP4 needs a multiple of 16 columns, got 24"),
    (put("weight", narrow((48, 32), torch.int32)), f"{LAYER}.weight must be NVFP4, FP8 or dense, got I32 [48, 32]"),
    (put("weight", narrow((48, 32), torch.float8_e4m3fn)),
     f"{LAYER}.weight_scale must be F64 or F32 or F16 or BF16 of 1 element, got F8_E4M3 [48, 2]"),
    (lambda stored: stored.update({
        f"{LAYER}.weight": narrow((24, 16)), f"{LAYER}.weight_scale": narrow((24, 2), torch.float8_e4m3fn)
     }), f"{LAYER}: {LAYER} must have a weight of shape [48, 32], got [24, 32]"),
    (lambda stored: stored.update({"model.norm.weight": narrow((2, 8))}),
     "model.norm.weight_scale is missing; there are weight"),
    (put("weight_scale_2", torch.tensor(-1.0)),
     f"from_modelopt: {LAYER}.weight_scale_2 must be a finite number >= 0, got -1.0"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BAD_TENSORS)
def test_bad_tensors(tmp_path, change, message):
    with pytest.raises(CheckpointError) as error:
        from_pretrained(llama(tmp_path, change))
    assert str(error.value) == message


def test_experts_are_packed_all_or_none(tmp_path):
    tensors, config = dense("Qwen3Moe")
    config["quantization_config"] = modelopt([])
    odd, rule = "model.layers.1.mlp.experts.3.up_proj.weight", "experts must be NVFP4 of one format, or dense, got"
    cases = {
        "one": (lambda key, t: "NVFP4" if ".experts." in key and key != odd else None,
                "model.layers.1.mlp.experts.gate_up_proj must be made of layers that are stored in one way, got "
                "model.layers.1.mlp.experts.0.gate_proj NVFP4, "),
        "side": (lambda key, t: "NVFP4" if ".experts." in key and "down" in key else None,
                 f"model.layers.0.mlp.experts: {rule} gate_up_proj dense, down_proj NVFP4"),
        "fp8": (lambda key, t: "FP8" if ".experts." in key else None,
                f"model.layers.0.mlp.experts: {rule} gate_up_proj FP8, down_proj FP8"),
    }  # fmt: skip
    for name, (scheme, message) in cases.items():
        folder = write(tmp_path / name, pack(tensors, scheme=scheme)[0], config)
        with pytest.raises(CheckpointError) as error:
            from_pretrained(folder)
        assert str(error.value).startswith(message), str(error.value)


def test_experts_of_another_size_or_number(tmp_path):
    stored, _ = pack(dense("Qwen3Moe")[0])
    experts, made_of = "model.layers.0.mlp.experts", "must be made of 10 NVFP4 layers, got 12"
    cases = {
        "size": ({"moe_intermediate_size": 32}, f"{experts}.0.gate_proj must have shape [32, 32], got [16, 32]"),
        "number": ({"num_experts": 5}, f"{experts}.gate_up_proj {made_of}"),
    }
    for name, (changes, message) in cases.items():
        config = {**dense("Qwen3Moe", **changes)[1], "quantization_config": modelopt(["lm_head", "*.gate"])}
        with pytest.raises(CheckpointError) as error:
            from_pretrained(write(tmp_path / name, stored, config))
        assert str(error.value) == message


def test_nan_scales(tmp_path):
    """Refused, or repaired where the configuration asks for it and the block is of zeros."""

    def spoil(stored):
        stored[f"{LAYER}.weight"][3, 8:16] = 0
        stored[f"{LAYER}.weight_scale"].view(torch.uint8)[3, 1] = 0x7F

    folder = llama(tmp_path, spoil)
    with pytest.raises(CheckpointError) as error:
        from_pretrained(folder)
    assert str(error.value) == (
        f"from_modelopt: {LAYER}.weight_scale must have no NaN, got 1, the first at [3, 1]; repair=True sets the 1 of "
        "them that scale all-zero blocks to 0; quantization_config's repair=True does so"
    )
    config = transformers.AutoConfig.from_pretrained(folder)
    config.quantization_config["repair"] = True
    model = from_pretrained(folder, config=config)
    assert model.model.layers[0].mlp.up_proj.weight_scale.view(torch.uint8)[3, 1] == 0
    assert logits(model).isfinite().all()
    assert "repair" not in model.config.quantization_config.to_dict()


GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}}
BAD_CONFIGS = [
    (modelopt([], quant_algo="W4A8_AWQ"),
     "quant_algo must be one of NVFP4, W4A16_NVFP4, FP8, MIXED_PRECISION, got 'W4A8_AWQ'"),
    (modelopt([], quant_algo=None), "quant_algo must be one of NVFP4, W4A16_NVFP4, FP8, MIXED_PRECISION, got None"),
    (modelopt([], group_size=32), "group_size must be 16 for NVFP4, got 32"),
    (modelopt("lm_head"), "ignore must be a list of strings, got 'lm_head'"),
    (modelopt([], quant_algo="MIXED_PRECISION"),
     "quantized_layers must name every layer's quant_algo where quant_algo is MIXED_PRECISION"),
    (modelopt([], quant_algo="MIXED_PRECISION", quantized_layers={"a": {"quant_algo": "NVFP4", "group_size": 8}}),
     "quantized_layers.a.group_size must be 16 for NVFP4, got 8"),
    (made.compressed([], config_groups={"g": GROUP, "h": {"targets": "Linear"}}),
     "config_groups.h must have a list of targets"),
    (made.compressed([], config_groups={"g": GROUP, "h": {**GROUP, "weights": {"num_bits": 4, "type": "int"}}}),
     "config_groups.h.weights must be NVFP4 or FP8 with one scale per tensor, got num_bits 4, type 'int', "
     "strategy None"),
    (made.compressed([], config_groups={"g": {**GROUP, "weights": {**GROUP["weights"], "group_size": 32}}}),
     "config_groups.g.weights.group_size must be 16 for NVFP4, got 32"),
    (made.compressed(["re:("]), "'re:(' is no regular expression: missing ), unterminated subpattern at position 0"),
]  # fmt: skip


@pytest.mark.parametrize("raw, message", BAD_CONFIGS)
def test_bad_configs(tmp_path, raw, message):
    tensors, config = dense("Llama")
    with pytest.raises(CheckpointError) as error:
        from_pretrained(write(tmp_path, tensors, {**config, "quantization_config": raw}))
    assert str(error.value) == f"quantization_config: {message}"


def test_what_a_configuration_says():
    """Layers by name, by what holds them, by pattern and by kind; what is ignored comes first."""
    from n3kernels.integrations.transformers_nvfp4.config import flatten, scheme

    raw = made.compressed(["lm_head", r"re:.*\.gate$"], config_groups={
        "a": {**GROUP, "targets": [r"re:.*experts\..*"]},
        "b": {"targets": ["model.o"], "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}},
        "c": {"targets": ["Embedding"], "weights": None},
    })  # fmt: skip
    says = {"lm_head": "dense", "x.experts.0.gate": "dense", "x.experts.0.up": "NVFP4", "model.o": "FP8", "x": "dense"}
    assert {name: scheme(raw, name) for name in says} == says
    assert scheme(made.compressed(["x"]), "x") == "dense" and scheme(made.compressed(["x"]), "x.y") == "NVFP4"
    raw = modelopt(["model.layers.0.self_attn", "*.gate", "mtp*"])
    says = {"model.layers.0.self_attn.q": "dense", "model.layers.0.self_attention.q": "NVFP4", "a.gate": "dense",
            "mtp.layers.0.x": "dense"}  # fmt: skip
    assert {name: scheme(raw, name) for name in says} == says
    nested = {"quantization": {"quant_algo": "MIXED_PRECISION", "exclude_modules": None, "quantized_layers": {
        "a.experts": {"quant_algo": "W4A16_NVFP4", "group_size": 16}, "a.b": {"quant_algo": "FP8"},
        "c": {"quant_algo": "FP8_PB_WO"},
    }}}  # fmt: skip
    says = {"a.experts.3.up": "NVFP4", "a.b": "FP8", "c": "FP8_PB_WO", "d": "dense", "a.b2": "dense"}
    assert {name: scheme(flatten(nested), name) for name in says} == says
    old = modelopt([])
    del old["ignore"]
    assert scheme({**old, "exclude_modules": ["x"]}, "x") == "dense"


def test_bad_hf_quant_configs(tmp_path):
    tensors, config = dense("Llama")
    write(tmp_path, tensors, config)
    for text, message in (("{,}", "not valid JSON"), ("[1]", "must hold a JSON object, got list"),
                          ('{"quantization": 3}', "quantization must be an object, got 3")):  # fmt: skip
        (tmp_path / "hf_quant_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            from_pretrained(tmp_path)


def test_a_configuration_that_says_otherwise(tmp_path, monkeypatch):
    """The stored tensors are taken, and the user hears of it; an algorithm of another name is refused."""
    warnings = []
    monkeypatch.setattr(loader.logger, "warning", warnings.append)
    layers_named = {LAYER: {"quant_algo": "FP8"}}
    folder = llama(tmp_path / "a", quant_algo="MIXED_PRECISION", quantized_layers=layers_named)
    assert packed_modules(from_pretrained(folder))
    assert len(warnings) == 1 and warnings[0].endswith(" and of 13 more. The stored tensors are taken.")
    warnings.clear()
    from_pretrained(llama(tmp_path / "b"))
    assert not warnings
    folder = llama(tmp_path / "c", quant_algo="MIXED_PRECISION", quantized_layers={LAYER: {"quant_algo": "NVFP4_AWQ"}})
    with pytest.raises(CheckpointError, match=f"{LAYER}: quant_algo NVFP4_AWQ is not served"):
        from_pretrained(folder)


def test_other_checkpoints_are_left_to_transformers(tmp_path):
    """Dense ones load as ever, compressed-tensors without NVFP4 goes to transformers' own class, and back."""
    tensors, config = dense("Llama")
    assert not packed_modules(from_pretrained(write(tmp_path / "dense", tensors, config)))
    int4 = {**made.compressed([]), "format": "pack-quantized"}
    int4["config_groups"] = {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}}
    from transformers.quantizers import auto

    theirs = auto.CompressedTensorsConfig
    seen = []
    loader._their[loader._CompressedTensorsConfig] = type("Theirs", (), {"from_dict": lambda raw: seen.append(raw)})
    auto.AutoQuantizationConfig.from_dict(int4)
    assert seen == [int4]
    assert loader.register_quantizers() == []
    loader.unregister_quantizers()
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] is theirs
    assert auto.AUTO_QUANTIZER_MAPPING["compressed-tensors"] is auto.CompressedTensorsHfQuantizer
    assert "modelopt" not in auto.AUTO_QUANTIZER_MAPPING and "modelopt" not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING


def test_enable_registers(tmp_path):
    loader.unregister_quantizers()
    n3.enable("nemotron_h")
    assert packed_modules(from_pretrained(llama(tmp_path)))
    n3.disable()
    assert "modelopt" not in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING
