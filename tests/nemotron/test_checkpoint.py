from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import assert_same_bits
from safetensors.torch import load_file, save_file
from small_model import CONFIG, random_model

from n3kernels.nemotron import CheckpointError, Config, load, save

IDS = torch.tensor([[1, 100, 164, 319, 100, 7]])
LINEAR = "backbone.layers.0.mixer.in_proj"
EXPERT = "backbone.layers.1.mixer.experts.3.down_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    save(random_model(), folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nvfp4")
    save(random_model(), folder, nvfp4=lambda name: "lm_head" not in name)
    return folder


def logits(folder):
    return load(folder, device="cpu")(IDS)


def rewrite(source, target, change=lambda tensors: None, config=None):
    """A copy of the checkpoint `source` in the folder `target`, with its tensors and its configuration changed."""
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, target / "model.safetensors")
    raw = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**raw, **(config or {})}))
    return target


# ---------------------------------------------------------------- round trips


def test_dense_round_trip(saved):
    model = load(saved, device="cpu")
    want = random_model().state_dict()
    assert model.state_dict().keys() == want.keys()
    for name, t in model.state_dict().items():
        assert_same_bits(t, want[name])
    assert model.config == CONFIG and not any(p.requires_grad for p in model.parameters())


def test_saving_rounds_to_bf16_but_for_the_recurrence(tmp_path):
    save(random_model(), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name.rsplit(".", 1)[1] for name, t in tensors.items() if t.dtype == torch.float32}
    assert kept == {"A_log", "D", "dt_bias", "e_score_correction_bias"}
    model = load(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.backbone.layers[0].mixer.A_log.dtype == torch.float32


def test_nvfp4_holds_what_quantize_makes(packed):
    """Loaded weights stay packed, and are those that `nvfp4_quantize` makes of the dense ones."""
    model, dense = load(packed, device="cpu"), random_model()
    layer, was = model.backbone.layers[0].mixer.in_proj, dense.backbone.layers[0].mixer.in_proj
    assert layer.quantized and not model.lm_head.quantized
    parts = (layer.weight, layer.weight_scale, layer.weight_scale_2)
    for part, want in zip(parts, torch.ops.n3.nvfp4_quantize(was.weight), strict=True):
        assert_same_bits(part, want)
    experts, were = model.backbone.layers[1].mixer.experts, dense.backbone.layers[1].mixer.experts
    for e, want in enumerate(torch.ops.n3.nvfp4_quantize(w) for w in were.down_proj):
        parts = (experts.down_proj, experts.down_proj_scale, experts.down_proj_scale_2)
        for part, value in zip(parts, want, strict=True):
            assert_same_bits(part[e], value)
    assert model(IDS).isfinite().all()


def test_a_packed_model_is_saved_as_it_is(packed, tmp_path):
    save(load(packed, device="cpu"), tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (packed, tmp_path))
    assert before.keys() == after.keys()
    for name in before:
        assert_same_bits(before[name], after[name])
    assert (tmp_path / "config.json").read_text() == (packed / "config.json").read_text()


def test_config_names_the_quantized_layers(packed):
    layers = json.loads((packed / "config.json").read_text())["quantization_config"]["quantized_layers"]
    assert LINEAR in layers and EXPERT in layers and "lm_head" not in layers


def test_shards(saved, tmp_path):
    tensors = load_file(saved / "model.safetensors")
    names, index = sorted(tensors), {}
    for i in range(3):
        part, file = names[i::3], f"model-0000{i + 1}-of-00003.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text((saved / "config.json").read_text())
    assert_same_bits(logits(tmp_path), logits(saved))
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    missing = tmp_path / "model-00002-of-00003.safetensors"
    assert str(error.value) == f"{missing}: no such file, but model.safetensors.index.json names it"


def renamed(tensors):
    for name in list(tensors):
        if name.startswith("backbone."):
            tensors["model." + name.removeprefix("backbone.")] = tensors.pop(name)


def stacked(tensors):
    for side in ("up_proj", "down_proj"):
        for prefix in ("backbone.layers.1.mixer", "mtp.layers.1.mixer"):
            rows = [tensors.pop(f"{prefix}.experts.{e}.{side}.weight") for e in range(8)]
            tensors[f"{prefix}.experts.{side}"] = torch.stack(rows)


def static_scales(tensors):
    """Scales of activations and of the KV cache, which an unquantised computation does not need."""
    for suffix in ("in_proj.input_scale", "k_proj.k_scale", "v_proj.v_scale"):
        tensors[f"backbone.layers.2.mixer.{suffix}"] = torch.ones(())


@pytest.mark.parametrize("change", [renamed, stacked, static_scales])
def test_other_layouts_give_the_same_model(saved, tmp_path, change):
    assert_same_bits(logits(rewrite(saved, tmp_path, change)), logits(saved))


def test_fp8_is_decoded(saved, tmp_path):
    def change(tensors):
        for name in (LINEAR, EXPERT):
            w = tensors[f"{name}.weight"]
            scale = w.abs().max() / 448
            tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = (w / scale).to(torch.float8_e4m3fn), scale

    model = load(rewrite(saved, tmp_path, change), device="cpu")
    stored = load_file(tmp_path / "model.safetensors")
    for name, weight in (
        (LINEAR, model.backbone.layers[0].mixer.in_proj.weight),
        (EXPERT, model.backbone.layers[1].mixer.experts.down_proj[3]),
    ):
        assert_same_bits(weight, stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"])


def test_hybrid_pattern_is_read(saved, tmp_path):
    older = {"layers_block_type": None, "hybrid_override_pattern": "ME*-M", "mtp_layers_block_type": None}
    assert_same_bits(logits(rewrite(saved, tmp_path, config=older)), logits(saved))


# ---------------------------------------------------------------- what cannot be read


def put(name, value):
    def change(tensors):
        tensors[name] = value

    return change


def drop(name):
    return lambda tensors: tensors.pop(name)


W = f"{LINEAR}.weight"
BAD_TENSORS = [
    ("saved", put("extra.weight", torch.ones(2)), "model.safetensors: unexpected tensor extra.weight"),
    ("saved", drop("lm_head.weight"), ": tensor lm_head.weight is missing"),
    ("saved", put("backbone.norm_f.weight", torch.ones(63)),
     "model.safetensors: backbone.norm_f.weight must have shape [64], got [63]"),
    ("saved", put("backbone.norm_f.weight", torch.ones(64).int()),
     "model.safetensors: backbone.norm_f.weight must be bfloat16 or float16 or float32, got int32"),
    ("saved", put(W, torch.ones(386, 64).to(torch.float64)),
     f"model.safetensors: {W} must be bfloat16 or float16 or float32, got float64"),
    ("saved", put(W, torch.ones(386, 64).to(torch.float8_e4m3fn)), f": tensor {W}_scale is missing"),
    ("packed", drop(f"{W}_scale_2"), f": tensor {W}_scale_2 is missing"),
    ("packed", put(f"{W}_scale_2", torch.ones(2)), f"model.safetensors: {W}_scale_2 must have 1 element, got 2"),
    ("packed", put(f"{W}_scale", torch.ones(386, 4)),
     f"model.safetensors: {W}_scale must be float8_e4m3fn, got float32"),
    ("packed", put(f"{W}_scale", torch.full((386, 4), math.nan).to(torch.float8_e4m3fn)),
     f": {W}_scale holds NaN; export the checkpoint again"),
    ("packed", put(f"{W}_scale", torch.ones(386, 8).to(torch.float8_e4m3fn)),
     f"model.safetensors: {W}_scale must have shape [386, 4], got [386, 8]"),
    ("packed", put(f"{EXPERT}.weight", torch.zeros(64, 31, dtype=torch.uint8)),
     f"model.safetensors: {EXPERT}.weight must have shape [64, 32], got [64, 31]"),
]  # fmt: skip


@pytest.mark.parametrize("which, change, message", BAD_TENSORS)
def test_bad_tensors(request, tmp_path, which, change, message):
    folder = rewrite(request.getfixturevalue(which), tmp_path, change)
    with pytest.raises(CheckpointError) as error:
        load(folder, device="cpu")
    where = folder / "model.safetensors" if message.startswith("model") else folder
    assert str(error.value) == f"{where}{message.removeprefix('model.safetensors')}"


BAD_CONFIGS = [
    ({"model_type": "llama"}, "model_type must be nemotron_h, got llama"),
    ({"layers_block_type": []}, "layers_block_type or hybrid_override_pattern must name at least one layer"),
    ({"layers_block_type": ["mamba", "conv"]},
     "layers_block_type must hold mamba, moe, attention, mlp, linear_attention, full_attention, got 'conv'"),
    ({"layers_block_type": "mamba"}, "layers_block_type must be a list, got 'mamba'"),
    ({"layers_block_type": [["mamba"]]},
     "layers_block_type must hold mamba, moe, attention, mlp, linear_attention, full_attention, got ['mamba']"),
    ({"layers_block_type": None, "hybrid_override_pattern": "MX"},
     "hybrid_override_pattern must hold M, E, *, -, got 'X'"),
    ({"layers_block_type": None, "hybrid_override_pattern": 7}, "hybrid_override_pattern must be a string, got 7"),
    ({"mtp_layers_block_type": ["mamba"]},
     "mtp_layers_block_type must hold no mamba layer: drafts could not be taken back"),
    ({"hidden_size": "64"}, "hidden_size must be of type int, got '64'"),
    ({"hidden_size": 64.0}, "hidden_size must be of type int, got 64.0"),
    ({"hidden_size": True}, "hidden_size must be of type int, got True"),
    ({"norm_topk_prob": 1}, "norm_topk_prob must be of type bool, got 1"),
    ({"layer_norm_epsilon": "small"}, "layer_norm_epsilon must be of type float, got 'small'"),
    ({"ssm_state_size": 0}, "ssm_state_size must be positive, got 0"),
    ({"chunk_size": -16}, "chunk_size must be positive, got -16"),
    ({"n_group": 0}, "n_group must be positive, got 0"),
    ({"n_groups": 3}, "n_groups must divide mamba_num_heads (2), got 3"),
    ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads (2), got 3"),
    ({"n_group": 3}, "n_group must divide n_routed_experts (8), got 3"),
    ({"n_group": 2, "topk_group": 3}, "topk_group must be at most n_group (2), got 3"),
    ({"n_group": 8, "topk_group": 1},
     "num_experts_per_tok must be at most the 1 experts of topk_group groups, got 2"),
    ({"num_experts_per_tok": 9}, "num_experts_per_tok must be at most the 8 experts of topk_group groups, got 9"),
    ({"moe_latent_size": -1}, "moe_latent_size must not be negative, got -1"),
    ({"eos_token_id": "</s>"}, "eos_token_id must be an int or a list of them, got '</s>'"),
    ({"eos_token_id": [2, 320]}, "eos_token_id must be in [0, 320), got 320"),
]  # fmt: skip


@pytest.mark.parametrize("change, message", BAD_CONFIGS)
def test_bad_configs(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG.to_dict(), **change}))
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    assert str(error.value) == f"{tmp_path / 'config.json'}: {message}"


@pytest.mark.parametrize("value", [None, True, -1, 0, 1.5, 1 << 40, "x", [], [1], {}, math.nan])
@pytest.mark.parametrize("key", sorted(CONFIG.to_dict()))
def test_any_value_is_read_or_refused(key, value):
    """Whatever a key holds: a configuration, or the one error that says what is wrong."""
    try:
        assert isinstance(Config.from_dict({**CONFIG.to_dict(), key: value}), Config)
    except CheckpointError as error:
        assert str(error)


def no_folder(folder):
    return folder / "nowhere", "{}: no such folder"


def file_for_folder(folder):
    (folder / "config.json").write_text("{}")
    return folder / "config.json", "{}: no such folder"


def no_config(folder):
    return folder, "{}/config.json: no such file"


def config_is_a_folder(folder):
    (folder / "config.json").mkdir()
    return folder, "{}/config.json: cannot be read: Is a directory"


def no_json(folder):
    (folder / "config.json").write_text("{,}")
    return folder, "{}/config.json: not valid JSON: "


def no_object(folder):
    (folder / "config.json").write_text("[1]")
    return folder, "{}/config.json: must hold a JSON object, got list"


def no_weights(folder):
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    return folder, "{}: holds no *.safetensors file"


def truncated(folder):
    no_weights(folder)
    save_file({"w": torch.ones(64)}, folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    return folder, "{}/model.safetensors: not a complete safetensors file: "


def no_safetensors(folder):
    no_weights(folder)
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04 a pickle in a zip")
    return folder, "{}/model.safetensors: not a complete safetensors file: "


def broken_index(folder):
    no_weights(folder)
    save_file({"w": torch.ones(64)}, folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    return folder, "{}/model.safetensors.index.json: must hold a JSON object with a weight_map of tensors to files"


BAD_FILES = [
    no_folder, file_for_folder, no_config, config_is_a_folder, no_json, no_object, no_weights, truncated,
    no_safetensors, broken_index,
]  # fmt: skip


@pytest.mark.parametrize("make", BAD_FILES, ids=lambda make: make.__name__)
def test_bad_files(tmp_path, make):
    path, message = make(tmp_path)
    with pytest.raises(CheckpointError) as error:
        load(path)
    text, message = str(error.value), message.format(path)
    assert text.startswith(message) and (text == message or message.endswith(": ")) and "\n" not in text
