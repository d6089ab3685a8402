"""The parts of scripts/gpu.py that need no GPU: what it plans, how it keeps time, what it writes."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import keep_record, was_whole

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("n3_gpu_script", ROOT / "scripts" / "gpu.py")
gpu = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)

H100 = gpu.Gpu("NVIDIA H100 80GB HBM3", "sm_90", "580.1")


def plan(arguments: str = "", facts=None, sanitizer="/usr/bin/compute-sanitizer"):
    options = gpu.parse(["--python", "python3", "--families", "nvfp4,mamba", *arguments.split()])
    return gpu.plan(options, H100, facts, ["bench_linear", "bench_quantize"], sanitizer)


@pytest.mark.parametrize(
    "facts, needed",
    [(None, True), ({"archs": ""}, True), ({"archs": "100a 120a"}, True), ({"archs": "90a 100a"}, False),
     ({"archs": "90"}, False)],
)  # fmt: skip
def test_builds_only_where_code_is_missing(facts, needed):
    assert gpu.needs_build(facts, "sm_90") is needed
    assert any(step.name == "build" for step in plan(facts=facts)) is needed


def test_plan():
    names = [step.name for step in plan(facts={"archs": "90a"})]
    assert names == [
        "tests: nvfp4", "tests: mamba", "memcheck: nvfp4", "memcheck: mamba", "racecheck: nvfp4", "racecheck: mamba",
        "bench: bench_linear", "bench: bench_quantize",
    ]  # fmt: skip
    assert [step.name for step in plan("--steps bench")] == ["bench: bench_linear", "bench: bench_quantize"]
    assert all("--prove" in step.command for step in plan("--steps tests"))
    assert {step.seconds for step in plan("--steps tests --seconds tests=40")} == {40}
    only = plan("--steps tests --only cuda")[0].command
    assert only[-2:] == ("-k", "cuda") and "-k" not in plan("--steps tests")[0].command


def test_a_missing_sanitizer_is_recorded():
    step = plan("--steps sanitizer", sanitizer=None)[0]
    assert gpu.run(step, 100, execute=None) == gpu.Outcome(step.name, "not run", 0.0, "compute-sanitizer was not found")


@pytest.mark.parametrize(
    "code, status", [(0, "passed"), (1, "failed"), (99, "failed"), (gpu.NO_TESTS, "empty"), (None, "out of time")]
)
def test_outcome(code, status):
    given = []

    def execute(command, seconds):
        given.append(seconds)
        return code, "...\n3 passed, 1 failed in 2.00s\n"

    outcome = gpu.run(gpu.Step("tests: nvfp4", ("true",), 300), 60, execute)
    assert outcome.status == status and "3 passed" in outcome.summary
    assert given == [60]  # what is left of the whole, not the step's own 300


def test_no_time_left():
    outcome = gpu.run(gpu.Step("tests: nvfp4", ("true",), 300), gpu.LEAST - 1, execute=None)
    assert (outcome.status, outcome.summary) == ("not run", "no time was left")


def test_execute_stops_a_whole_process_group(capfd):
    """The command's own child is ended too; what was printed until then is kept and shown."""
    script = "import subprocess, time; print('begun', flush=True); subprocess.run(['sleep', '60']); print('late')"
    start = time.monotonic()
    code, output = gpu.execute([sys.executable, "-c", script], 3)
    assert (code, output) == (None, "begun\n")
    assert time.monotonic() - start < 10  # the child, alive, would hold the pipe open
    assert capfd.readouterr().out == "begun\n"


def test_execute_returns_the_exit_code():
    assert gpu.execute([sys.executable, "-c", "print(1); raise SystemExit(7)"], 60) == (7, "1\n")


def test_closing_line():
    pytest_ = "....\n===== 12 passed, 3 deselected in 4.20s =====\n"
    assert gpu.closing_line(pytest_) == "12 passed, 3 deselected in 4.20s"
    sanitized = pytest_ + "========= ERROR SUMMARY: 0 errors\n"
    assert gpu.closing_line(sanitized) == "12 passed, 3 deselected in 4.20s; ERROR SUMMARY: 0 errors"
    assert gpu.closing_line("[1/2] cc\nninja: build stopped.\n\n") == "ninja: build stopped."
    assert gpu.closing_line("") == ""


def benchmark_run(group: str, median: float = 1e-3) -> dict:
    stats = {"median": median, "min": median, "iqr": 0.0}
    entry = {"group": group, "name": group, "stats": stats, "extra_info": {"provider": "cuda"}}
    return {"machine_info": {"n3": {"kind": "cuda", "device": H100.name}}, "benchmarks": [entry]}


def outcome(name: str, status: str = "passed"):
    return gpu.Outcome(name, status, 1.0, "ok")


def test_commands_of_one_commit_add_up():
    """A borrowed machine is used in several commands: later steps replace the same ones and keep the others."""
    tests = gpu.results(H100, "abc", "2026-01-02", [outcome("tests: nvfp4", "failed"), outcome("build")], [])
    first = gpu.results(H100, "abc", "2026-01-02", [outcome("bench: a")], [benchmark_run("a", 2e-3)])
    again = gpu.results(
        H100, "abc", "2026-01-02", [outcome("tests: nvfp4"), outcome("bench: a"), outcome("bench: b", "not run")],
        [benchmark_run("a"), benchmark_run("b")],
    )  # fmt: skip
    merged = gpu.merge(gpu.merge(gpu.merge(None, tests), first), again)
    statuses = {step["name"]: step["status"] for step in merged["steps"]}
    assert statuses == {"build": "passed", "tests: nvfp4": "passed", "bench: a": "passed", "bench: b": "not run"}
    assert [(b["group"], b["stats"]["median"]) for b in merged["benchmarks"]] == [("a", 1e-3), ("b", 1e-3)]


def test_what_was_not_run_replaces_nothing():
    ran = gpu.results(H100, "abc", "2026-01-02", [outcome("tests: nvfp4")], [benchmark_run("a")])
    late = gpu.results(H100, "abc", "2026-01-02", [outcome("tests: nvfp4", "not run")], [])
    merged = gpu.merge(ran, late)
    assert [step["status"] for step in merged["steps"]] == ["passed"]
    assert len(merged["benchmarks"]) == 1 and merged["machine_info"]


def test_another_commit_starts_afresh():
    old = gpu.results(H100, "abc", "2026-01-02", [outcome("tests: nvfp4")], [benchmark_run("a")])
    new = gpu.results(H100, "def", "2026-01-02", [outcome("tests: mamba")], [])
    assert gpu.merge(old, new) == new


def test_summary():
    result = gpu.results(H100, "abc", "2026-01-02", [outcome("tests: nvfp4", "out of time")], [benchmark_run("a")])
    text = gpu.summary(result)
    assert "# NVIDIA H100 80GB HBM3 (sm_90), 2026-01-02, commit abc" in text
    assert "| tests: nvfp4 | out of time | 1 | ok |" in text and "| a | cuda |" in text


def test_saves_to_the_tree_and_to_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    gpu.save(gpu.results(H100, "abc", "2026-01-02", [outcome("build")], []))
    saved = gpu.save(gpu.results(H100, "abc", "2026-01-02", [outcome("tests: nvfp4")], [benchmark_run("a")]))
    path = tmp_path / "benchmarks/results/nvidia-h100-80gb-hbm3/2026-01-02.json"
    assert gpu.report.read(path) == saved and [s["name"] for s in saved["steps"]] == ["build", "tests: nvfp4"]
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"2026-01-02.json", "2026-01-02.md"}


def test_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "this_gpu", lambda: None)
    assert gpu.main([]) == 2
    assert "no GPU is visible" in capsys.readouterr().err
    assert gpu.main(["--dry-run", "--steps", "bench"]) == 0
    assert "bench: bench_linear" in capsys.readouterr().out


@pytest.mark.parametrize("whole", [True, False])
def test_a_part_of_the_tests_proves_nothing_but_disproves(whole):
    before = {"moe_sort": {"cuda": {"passed": 9}, "triton": {"passed": 9}}, "sample": {"cuda": {"passed": 9}}}
    passed = Counter({("moe_sort", "cuda"): 3, ("moe_route", "cuda"): 4, ("moe_route", "reference"): 4})
    keep_record(before, passed, {("moe_sort", "triton"), ("moe_route", "triton")}, whole, {"commit": "c"})
    kept = {(op, b): facts["passed"] for op, backends in before.items() for b, facts in backends.items()}
    proven = {("moe_sort", "cuda"): 3, ("moe_route", "cuda"): 4} if whole else {("moe_sort", "cuda"): 9}
    assert kept == {**proven, ("sample", "cuda"): 9}


@pytest.mark.parametrize(
    "change, whole",
    [({}, True), ({"exitstatus": 1}, True), ({"keyword": "sort"}, False), ({"markexpr": "slow"}, False),
     ({"args": ["t.py::test_a"]}, False), ({"shouldfail": "stopping after 1 failures"}, False),
     ({"exitstatus": 2}, False)],
)  # fmt: skip
def test_which_runs_are_whole(change, whole):
    facts = {"keyword": "", "markexpr": "not slow", "args": ["tests/moe"]}
    facts = {**facts, "shouldstop": False, "shouldfail": False, "exitstatus": 0, **change}
    config = SimpleNamespace(args=facts["args"], getoption=lambda name: facts[name])
    session = SimpleNamespace(config=config, **{k: facts[k] for k in ("shouldstop", "shouldfail", "exitstatus")})
    assert was_whole(session) is whole
