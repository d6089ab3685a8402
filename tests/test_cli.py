"""The command line, end to end: what it prints, and that wrong input ends with one line and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent / "nemotron"))
from small_model import CONFIG, random_model  # noqa: E402

from n3kernels import BACKENDS, _dispatch, cli, doctor, nemotron, use_backend  # noqa: E402
from n3kernels._dispatch import OPS  # noqa: E402
from n3kernels._truth import Deviation, Watch, compare  # noqa: E402
from n3kernels.mamba import gated_rms_norm  # noqa: E402

SHORT = ("--prompt", "def f(", "--max-tokens", "6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    nemotron.save(random_model(), path, nvfp4=lambda name: "lm_head" not in name)
    return path


@pytest.fixture
def run(capsys, monkeypatch):
    """Calls the command line in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "160")

    def call(*argv):
        code = cli.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def refused(result, message):
    """Exit code 2, nothing on stdout, and this one line on stderr."""
    code, out, err = result
    assert (code, out) == (2, "") and err == f"n3kernels: {message}\n", err


# ---------------------------------------------------------------- demo


def test_demo(run, folder):
    code, out, err = run("demo", "--model", folder, *SHORT, "--drafts", 2)
    assert code == 0 and err == ""
    assert "Both texts are equal, token for token (6 tokens)." in out
    assert out.count("def f(") == 2 and "multi-token prediction, 2 drafts" in out
    assert "5 layers" in out and "acceptance length " in out
    for name in ("nvfp4_linear", "mamba2_prefill", "mamba2_decode", "gated_rms_norm", "moe_route", "mtp_verify"):
        assert name in out


def test_demo_samples_and_thinks(run, folder):
    argv = ("demo", "--model", folder, *SHORT, "--temperature", 0.9, "--seed", 3)
    first, second = run(*argv), run(*argv, "--budget", 2)
    assert first[0] == second[0] == 0
    assert "thinking_budget" not in first[1] and "thinking_budget" in second[1]
    assert "<think>" in second[1] and "</think>" in second[1]


def test_demo_reports_the_training(run, folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    bits = {"bits_per_byte": {"nvfp4": 1.5, "bf16": 1.4, "four_gram": 2.25}}
    (tmp_path / "result.json").write_text(json.dumps(bits))
    _, out, _ = run("demo", "--model", tmp_path, *SHORT)
    assert "standard library: NVFP4 1.500, bf16 1.400, a 4-gram model 2.250" in out


def test_demo_says_loudly_that_texts_differ(run, folder, monkeypatch):
    honest = cli.generate

    def wrong(model, prompts, max_tokens, *, drafts, **options):
        result = honest(model, prompts, max_tokens, drafts=drafts, **options)
        if drafts:
            result.tokens[0][2] ^= 1
        return result

    monkeypatch.setattr(cli, "generate", wrong)
    code, out, _ = run("demo", "--model", folder, *SHORT)
    assert code == 1 and "THE TEXTS DIFFER from token 2 on" in out and "are equal" not in out


def test_demo_shows_no_control_characters(run, folder, monkeypatch):
    honest = cli.generate

    def escape(*args, **options):
        result = honest(*args, **options)
        result.tokens[0][:2] = [64 + 27, 64 + ord("[")]
        return result

    monkeypatch.setattr(cli, "generate", escape)
    _, out, _ = run("demo", "--model", folder, *SHORT)
    assert "\x1b" not in out and "\ufffd[" in out


def test_demo_as_a_process(folder):
    command = [sys.executable, "-m", "n3kernels", "demo", "--max-tokens", "4", "--model"]
    good = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    assert good.returncode == 0 and "Both texts are equal" in good.stdout, good.stderr
    bad = subprocess.run([*command, "nowhere"], capture_output=True, text=True)
    assert (bad.returncode, bad.stdout, bad.stderr) == (2, "", "n3kernels: nowhere: no such folder\n")


# ---------------------------------------------------------------- wrong input


def test_bad_values_of_ours(run):
    refused(run("demo", "--temperature", "inf"), "--temperature must be finite, got inf")
    refused(run("demo", "--prompt", "a" * 8193), "--prompt must be at most 8192 bytes, got 8193")


@pytest.mark.parametrize("argv, named", [
    (("demo", "--max-tokens", "0"), "--max-tokens"), (("demo", "--max-tokens", "many"), "--max-tokens"),
    (("demo", "--drafts", "0"), "--drafts"), (("demo", "--temperature", "-1"), "--temperature"),
    (("demo", "--temperature", "nan"), "--temperature"), (("demo", "--seed", str(2**63)), "--seed"),
    (("demo", "--budget", "-1"), "--budget"), (("demo", "--no-such-option"), "--no-such-option"),
    (("demo", "a file"), "a file"), (("dance",), "dance"), (("doctor", "--prove", "now"), "now"), ((), "command"),
])  # fmt: skip
def test_bad_command_lines(run, argv, named):
    """The words are the parser's own and change with its version; the form is ours."""
    code, out, err = run(*argv)
    assert (code, out) == (2, "") and err.startswith("n3kernels: ") and err.count("\n") == 1 and named in err


def test_prompt_that_is_no_utf8(run, folder):
    """The bytes of the command line reach a model of bytes as they are."""
    code, _, err = run("demo", "--model", folder, "--prompt", "\udcff\udc80", "--max-tokens", 2)
    assert code == 0, err


def changed(folder, target, change=lambda tensors: None, **config):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **config}))
    return target


def test_no_such_folder(run, tmp_path):
    refused(run("demo", "--model", tmp_path / "nowhere"), f"{tmp_path / 'nowhere'}: no such folder")


def test_empty_folder(run, tmp_path):
    refused(run("demo", "--model", tmp_path), f"{tmp_path / 'config.json'}: no such file")


def test_truncated_safetensors(run, folder, tmp_path):
    file = changed(folder, tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    code, out, err = run("demo", "--model", tmp_path)
    assert (code, out) == (2, "") and err.startswith(f"n3kernels: {file}: not a complete safetensors file: ")
    assert err.count("\n") == 1


BAD_CHECKPOINTS = [
    ({"layers_block_type": ["mamba", "conv"]}, None, "config.json: layers_block_type must hold mamba, moe, attention, "
     "mlp, linear_attention, full_attention, got 'conv'"),
    ({"hidden_size": -64}, None, "config.json: hidden_size must be positive, got -64"),
    ({"vocab_size": "320"}, None, "config.json: vocab_size must be of type int, got '320'"),
    ({}, ("lm_head.weight", torch.zeros(320, 64, dtype=torch.int32)),
     "model.safetensors: lm_head.weight must be bfloat16 or float16 or float32, got int32"),
    ({}, ("lm_head.weight", torch.zeros(320, 63)),
     "model.safetensors: lm_head.weight must have shape [320, 64], got [320, 63]"),
    ({}, ("lm_head.bias", torch.zeros(320)), "model.safetensors: unexpected tensor lm_head.bias"),
]  # fmt: skip


@pytest.mark.parametrize("config, tensor, message", BAD_CHECKPOINTS)
def test_bad_checkpoints(run, folder, tmp_path, config, tensor, message):
    changed(folder, tmp_path, lambda tensors: tensors.update([tensor] if tensor else []), **config)
    refused(run("demo", "--model", tmp_path), f"{tmp_path}/{message}")


def test_a_model_of_other_tokens(run, tmp_path):
    nemotron.save(random_model(vocab_size=97), tmp_path)
    message = f"{tmp_path}: the demo reads and writes bytes: vocab_size must be 320, got 97"
    refused(run("demo", "--model", tmp_path), message)


def test_a_model_without_mtp(run, tmp_path):
    nemotron.save(random_model(mtp_layers=(), num_nextn_predict_layers=0), tmp_path)
    message = "generate: drafts need a checkpoint with an MTP layer (num_nextn_predict_layers is 0)"
    refused(run("demo", "--model", tmp_path), message)


def test_a_forced_backend_that_cannot(run, folder):
    other = "cpu" if torch.cuda.is_available() else "cuda"
    with use_backend(other):
        code, out, err = run("demo", "--model", folder, *SHORT)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert f"backend '{other}' is forced but does not take this call: takes {other} tensors" in err


# ---------------------------------------------------------------- doctor


def test_doctor(run):
    code, out, _ = run("doctor")
    assert code == 0, out
    for fact in ("n3kernels ", "build ", "python ", f"torch        {torch.__version__}", "triton ", "gpu"):
        assert fact in out
    for name in OPS:
        assert out.count(f" {name} ") >= 2  # in the table of backends and in the check
    assert "WRONG" not in out and "Every operator agrees with its definition here." in out


def test_doctor_finds_a_wrong_operator(run, monkeypatch):
    """A backend that is off by one part in ten thousand, one that raises, and an index that is off by one."""
    op, honest = OPS["gated_rms_norm"], OPS["gated_rms_norm"].reference
    monkeypatch.setattr(op, "reference", lambda x, *a: honest(x, *a) * (1 if x.dtype == torch.float64 else 1.0001))
    sort, sorted_ = OPS["moe_sort"], OPS["moe_sort"].reference
    answers = iter([1, 0])
    monkeypatch.setattr(sort, "reference", lambda *a: tuple(t + next(answers, 0) for t in sorted_(*a)))

    def broken(*args, **kwargs):
        raise RuntimeError("n3::moe_route: on fire")

    found = doctor.check(op, "cpu", "cpu")["reference"]
    assert not doctor.is_right(found) and 0.9e-4 < found.relative < 1.1e-4
    with use_backend("reference"):
        wrong = doctor.check(sort, "cpu", "cpu")["reference"]
    assert wrong.differ > 0 and not doctor.is_right(wrong)
    monkeypatch.setattr(OPS["moe_route"], "check", broken)
    code, out, _ = run("doctor")
    assert code == 1 and "WRONG" in out and "AN OPERATOR IS WRONG HERE" in out
    assert "RuntimeError: n3::moe_route: on fire" in out


@pytest.mark.parametrize("name", sorted(OPS))
def test_standing_on_a_gpu(monkeypatch, name):
    """The words of the table for an architecture on which a part is proven, without a GPU."""
    op = OPS[name]
    if op.composite:
        assert doctor.standing(op, "reference", "cuda", "sm_90") == ("composite", None)
        return
    monkeypatch.setattr(_dispatch, "_force", None)
    monkeypatch.setattr(_dispatch, "build_archs", lambda: ("sm_90",))
    monkeypatch.setattr(_dispatch, "_has_triton", lambda: True)
    monkeypatch.setattr(op, "kernels", {**op.kernels, "cuda": object()})
    monkeypatch.setattr(_dispatch, "proven", dict)
    words = {b: doctor.standing(op, b, "cuda", "sm_90")[0] for b in BACKENDS}
    assert words["cuda"] == "opt-in" and words["cpu"] == "-"
    assert words["triton"] == ("default, unproven" if op.triton else "-")
    assert words["reference"] == ("available" if op.triton else "default")
    monkeypatch.setattr(_dispatch, "proven", lambda: {"sm_90": {name: {"cuda": {}}}})
    assert doctor.standing(op, "cuda", "cuda", "sm_90") == ("default, proven", None)
    assert doctor.standing(op, "cuda", "cuda", "sm_80") == ("-", "not built for sm_80, only for sm_90")


def test_doctor_prove_needs_a_gpu(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(run("doctor", "--prove"), "doctor --prove: needs a CUDA GPU, and none is visible")


def test_doctor_prove_needs_the_tests(run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(doctor, "_tests", lambda: tmp_path)
    message = "needs a source checkout: the tests are not part of an installed package"
    refused(run("doctor", "--prove"), f"doctor --prove: {message}")


def test_doctor_prove_runs_the_tests(run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_dispatch, "user_record", lambda: tmp_path / "proven.json")
    commands = []
    monkeypatch.setattr(doctor.subprocess, "call", lambda command, cwd: commands.append(command) or 5)
    code, out, _ = run("doctor", "--prove")
    assert code == 5 and str(tmp_path / "proven.json") in out
    assert "--prove" in commands[0] and f"--prove-to={tmp_path / 'proven.json'}" in commands[0]


# ---------------------------------------------------------------- bench and the rest


def test_bench_forwards_everything(run, monkeypatch):
    pytest.importorskip("pytest_benchmark", reason="bench needs pytest-benchmark")
    from n3kernels.benchmarks import run as benchmarks

    seen = []
    monkeypatch.setattr(benchmarks, "main", lambda argv: seen.append(argv) or 3)
    code, _, _ = run("bench", "-k", "nvfp4", "--full", "--threads", "1", "--help")
    assert code == 3 and seen == [["-k", "nvfp4", "--full", "--threads", "1", "--help"]]


def test_bench_explains_its_options(run):
    pytest.importorskip("pytest_benchmark", reason="bench needs pytest-benchmark")
    code, out, _ = run("bench", "--help")
    assert code == 0 and "usage: n3kernels bench" in out
    code, _, err = run("bench", "--isa", "mmx")
    assert code == 2 and "invalid choice: 'mmx'" in err


def test_help_and_version(run):
    code, out, _ = run("--help")
    assert code == 0 and all(command in out for command in ("demo", "doctor", "bench"))
    code, out, _ = run("--version")
    assert code == 0 and out.startswith("n3kernels ")


# ---------------------------------------------------------------- the comparison that both commands show


def test_watch_counts_and_measures():
    x = torch.randn(3, 64)
    with Watch() as watch:
        gated_rms_norm(x, None, torch.ones(64), 64)
        gated_rms_norm(x.bfloat16(), None, torch.ones(64), 64)
        x + 1
    assert list(watch.seen) == ["gated_rms_norm"]
    seen = watch.seen["gated_rms_norm"]
    assert seen.calls.total() == 2 and 1e-4 < seen.relative < 2**-8  # bf16 rounds by up to 2^-9 of each value


def test_compare_reads_states_before_they_are_written():
    op = OPS["ssm_update"]
    from n3kernels._samples import sample

    args, kwargs = sample("ssm_update")
    found, state = Deviation(), args[0].clone()
    compare(op, args, kwargs, found)
    assert not torch.equal(args[0], state) and found.relative < 1e-6


def test_deviation_does_not_overlook():
    nan, inf = float("nan"), float("inf")
    for out, truth, wrong in (
        ([1.0, nan], [1.0, nan], False), ([1.0, nan], [1.0, 2.0], True), ([1.0, 2.0], [1.0, nan], True),
        ([inf], [inf], False), ([inf], [-inf], True), ([0.0], [1e-9], True), ([], [], False),
    ):  # fmt: skip
        d = Deviation()
        d.add(torch.tensor(out), torch.tensor(truth, dtype=torch.float64))
        assert (d.relative > 0.5) == wrong, (out, truth)
    d = Deviation()
    d.add(torch.tensor([1, 2, 3]), torch.tensor([1, 5, 3]))
    assert (d.integers, d.differ, d.error) == (3, 1, None)
    with pytest.raises(RuntimeError, match=r"a result has shape \[2\], its definition \[3\]"):
        d.add(torch.ones(2), torch.ones(3))


def test_the_default_prompt_fits():
    assert len(cli.PROMPT.encode()) <= cli.MOST_PROMPT and CONFIG.vocab_size == 320
