"""The shipped checkpoint: it reads, it has learnt, and drafts do not change what it says."""

from __future__ import annotations

import json
import math
import sysconfig
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from n3kernels import tiny
from n3kernels.nemotron import generate, load

OPS = ("nvfp4_linear", "moe_experts", "mamba2_decode", "mtp_verify", "sample")


@pytest.fixture(scope="module")
def model():
    return load(tiny.PATH, dtype=torch.float32)


def test_size():
    """At most 4 MB, NVFP4 codes and scales under ModelOpt's names."""
    assert sum(path.stat().st_size for path in tiny.PATH.iterdir() if path.suffix != ".py") <= 4e6


@torch.no_grad()
def test_predicts_python_better_than_a_4_gram(model):
    """Bits per byte on a held-out module of the standard library (its CRC says so: examples/train_tiny.py)."""
    text = (Path(sysconfig.get_paths()["stdlib"]) / "shutil.py").read_bytes()[2048:6144]
    ids = torch.tensor([tiny.encode(text, bos=True)], device=model.lm_head.weight.device)
    bits = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:]).item() / math.log(2)
    record = json.loads((tiny.PATH / "result.json").read_text())["bits_per_byte"]
    assert record["nvfp4"] < record["four_gram"] - 0.4
    assert bits < record["four_gram"]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("drafts", [1, 4])
def test_drafts_do_not_change_the_text(model, temperature, drafts):
    prompt = tiny.encode("import os\n\n\nclass Path:\n    def __init__(self", bos=True)
    options = {"temperature": temperature, "seed": 3, "max_tokens": 48}
    plain = generate(model, [prompt], **options)
    speculative = generate(model, [prompt], drafts=drafts, **options)
    assert plain.tokens == speculative.tokens
    assert speculative.acceptance_length > 1.2
