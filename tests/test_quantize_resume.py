"""``n3kernels quantize``: that it goes on where it was stopped, and what it refuses."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from dense_checkpoints import INDEX, command_line, refused, same_files, tensors, write
from safetensors.torch import save_file

from n3kernels import cli, quantize_checkpoint
from n3kernels._resumable import MANIFEST
from n3kernels.quantize_checkpoint import Job


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "src")


@pytest.fixture
def run(capsys, monkeypatch):
    return command_line(capsys, monkeypatch)

# ---------------------------------------------------------------- stopped, and gone on with


def killed_in(shard: int, source: Path, dst: Path, recipe: str = "nvfp4") -> None:
    """A process that is gone in the middle of the shard, without a chance to clean up."""
    pid = os.fork()
    if pid == 0:
        Job(source, recipe).run(dst, lambda size, file: os._exit(9) if file.startswith(f"model-0000{shard}") else None)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def test_goes_on_where_it_was_killed(source, tmp_path, run):
    dst = tmp_path / "dst"
    killed_in(2, source, dst)
    assert {path.name for path in dst.iterdir()} == {
        MANIFEST, "model-00001-of-00003.safetensors", ".model-00002-of-00003.safetensors.part"
    }  # fmt: skip
    before = (dst / "model-00001-of-00003.safetensors").stat()
    code, out, _ = run(source, dst)
    after = (dst / "model-00001-of-00003.safetensors").stat()
    assert code == 0 and "3 files, 1 of which were there" in out
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns), "a finished shard was redone"
    assert run(source, tmp_path / "whole")[0] == 0
    same_files(dst, tmp_path / "whole")


def test_a_finished_shard_of_another_size_is_redone(source, tmp_path):
    dst = tmp_path / "dst"
    killed_in(3, source, dst)
    path = dst / "model-00001-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert Job(source, "nvfp4").run(dst) == ["model-00002-of-00003.safetensors"]
    Job(source, "nvfp4").run(tmp_path / "whole")
    same_files(dst, tmp_path / "whole")


def test_killed_after_the_last_shard(source, tmp_path, monkeypatch):
    """All that is left is written: nothing is finished before its configuration is there."""

    def stop(dst):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quantize_checkpoint, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            Job(source, "nvfp4").run(tmp_path / "dst")
    assert len(Job(source, "nvfp4").run(tmp_path / "dst")) == 3
    assert not (tmp_path / "dst" / MANIFEST).exists()


# ---------------------------------------------------------------- what is refused


def test_never_overwrites(source, tmp_path, run):
    dst = tmp_path / "dst"
    assert run(source, dst)[0] == 0
    before = {path.name: path.stat().st_mtime_ns for path in dst.iterdir()}
    refused(run(source, dst), f"{dst}: holds a checkpoint already; give a new folder")
    assert before == {path.name: path.stat().st_mtime_ns for path in dst.iterdir()}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    refused(run(source, tmp_path / "other"), f"{tmp_path / 'other'}: is not empty; give a new folder")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["notes.txt"]
    refused(run(source, source), f"{source}: is the folder to read from")
    refused(run(source, source / "config.json"), f"{source / 'config.json'}: is no folder")


def test_goes_on_with_the_same_alone(source, tmp_path, run):
    dst = tmp_path / "dst"
    killed_in(2, source, dst)
    begun = f"{dst}: was begun with another {{}}; remove it to begin again"
    refused(run(source, dst, "--recipe", "nvfp4-4over6"), begun.format("recipe"))
    refused(run(source, dst, "--exclude", "*.o_proj"), begun.format("exclude"))
    os.utime(source / "model-00003-of-00003.safetensors")
    refused(run(source, dst), begun.format("source"))
    (dst / MANIFEST).write_text("{")
    refused(run(source, dst), f"{dst / MANIFEST}: is damaged; remove the folder to begin again")


def test_two_at_once(source, tmp_path):
    answers = []

    def second(size, file):
        if not answers:
            code = cli.main(["quantize", str(source), str(tmp_path / "dst")])
            answers.append(code)

    Job(source, "nvfp4").run(tmp_path / "dst", second)
    assert answers == [2]


def change(name, value):
    return lambda source: write(source, {**tensors(), name: value})


def without(file):
    return lambda source: (source / file).unlink()


def text(file, content):
    return lambda source: (source / file).write_text(content)


def twice(source):
    (source / INDEX).unlink()
    save_file({"lm_head.weight": torch.ones(16, 16)}, source / "model.safetensors")


UP = "model.layers.1.mlp.up_proj.weight"
BAD_SOURCES = [
    (lambda source: shutil.rmtree(source), "{}: no such folder"),
    (without("config.json"), "{}/config.json: no such file"),
    (text("config.json", "{,}"), "{}/config.json: cannot be read: Expecting property name"),
    (text("config.json", "[1]"), "{}/config.json: must hold a JSON object, got list"),
    (text("config.json", '{"quantization_config": {}}'), "{}: is quantized already"),
    (text("hf_quant_config.json", "{}"), "{}: is quantized already"),
    (without("model-00002-of-00003.safetensors"),
     "{}/model-00002-of-00003.safetensors: no such file, but model.safetensors.index.json names it"),
    (text(INDEX, "{}"), f"{{}}/{INDEX}: must hold a JSON object with a weight_map of tensors to files"),
    (text("model-00002-of-00003.safetensors", "PK"), "{}/model-00002-of-00003.safetensors: not a complete"),
    (change(UP, torch.full((48, 32), float("nan"))),
     f"{{}}/model-00003-of-00003.safetensors: {UP} must be finite, got NaN or infinity"),
    (change(UP, torch.full((48, 32), -float("inf")).half()),
     f"{{}}/model-00003-of-00003.safetensors: {UP} must be finite, got NaN or infinity"),
    (twice, "{}/model.safetensors: lm_head.weight is in model-00002-of-00003.safetensors too"),
]  # fmt: skip


@pytest.mark.parametrize("spoil, message", BAD_SOURCES)
def test_bad_sources(source, tmp_path, run, spoil, message):
    spoil(source)
    code, _, err = run(source, tmp_path / "dst")
    assert code == 2 and err.startswith("n3kernels: " + message.format(source)) and err.count("\n") == 1, err
    assert not (tmp_path / "dst" / "config.json").exists()


def test_bad_options(source, tmp_path, run):
    dst = tmp_path / "dst"
    refused(run(source, dst, "--recipe", "int4"), "--recipe must be nvfp4 or nvfp4-4over6, got int4")
    refused(run(source, dst, "--exclude", "*.o_prj"), "--exclude *.o_prj matches no layer")
    assert run(source, dst, "--device", "nowhere")[0] == 2
    refused(run(source, dst, "--exclude", "model.*"), f"{source}: there is no weight to quantize")
    assert not dst.exists()


def test_a_full_disk(source, tmp_path, run, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    refused(run(source, tmp_path / "dst"), f"{tmp_path / 'dst'}: 0.0 GB are needed, 0.0 GB are free")
