"""The pure parts of the benchmark harness: table, comparison, environment of a run."""

from __future__ import annotations

import copy
import json

import pytest
from n3kernels.benchmarks import history, report, run
from n3kernels.benchmarks.roofs import Roofs

CPU = {
    "kind": "cpu", "device": "Intel(R) Xeon(R) Processor", "isa": "avx2", "threads": 2, "torch": "2.13.0",
    "cpu": {"family": 6, "model": 143, "stepping": 8, "count": 2}, "n3kernels": "0.1.0", "load": 0.1,
    "roofs": {"bandwidth": 2e10, "flops": {"float32": 2e11, "bfloat16": 4e11}, "source": "measured", "copy": 1e10},
}  # fmt: skip


def bench(provider: str, median: float, group: str = "linear M=1", spread: float = 0.02, best: float | None = None):
    stats = {
        "median": median, "min": median * 0.98 if best is None else best, "iqr": median * spread, "max": median * 2,
        "mean": median, "stddev": 0.0, "rounds": 30, "iterations": 5, "data": [median] * 30,
    }  # fmt: skip
    extra = {"provider": provider, "bytes": 2e6, "flops": 4e6, "max_error": 0.0, "roof_percent": 42.0}
    return {"group": group, "name": f"test[{provider}]", "stats": stats, "extra_info": extra}


def made_run(*benchmarks, **machine):
    info = {"node": "host", "python_version": "3.11", "n3": {**CPU, **machine}}
    commit = {"id": "0123456789abcdef", "dirty": False, "author": "someone"}
    return {"machine_info": info, "commit_info": commit, "datetime": "2026-01-02", "benchmarks": list(benchmarks)}


# ---- table


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_ratios_are_against_the_fastest_torch_of_the_group():
    """Here torch's float32 path is the faster one: the slow bfloat16 path must not flatter our kernel."""
    text = report.table(
        made_run(
            bench("cpu", 1e-3), bench("torch", 8e-3), bench("torch-fp32", 2e-3), bench("reference", 9e-3),
            bench("cpu", 3e-6, group="other"), bench("reference", 6e-6, group="other"),
        )
    )  # fmt: skip
    head, _, *rows = cells(text)
    found = {(row[0], row[1]): row[head.index("× torch")] for row in rows}
    assert found == {
        ("linear M=1", "cpu"): "2.00", ("", "torch"): "0.25", ("", "torch-fp32 (baseline)"): "1.00",
        ("", "reference"): "0.22", ("other", "cpu"): "2.00", ("", "reference (baseline)"): "1.00",
    }  # fmt: skip


def test_table_row():
    head, _, row = cells(report.table(made_run(bench("torch", 2e-3, spread=0.1))))
    want = {
        "median": "2 ms", "best": "1.96 ms", "spread": "±5 %", "% of limit": "42", "GB/s": "1.0", "GFLOP/s": "2",
        "max error": "0",
    }  # fmt: skip
    assert {name: row[head.index(name)] for name in want} == want


def test_a_benchmark_without_work_has_empty_cells():
    lone = bench("n3 function", 2e-6)
    lone["extra_info"] = {"provider": "n3 function"}
    head, _, row = cells(report.table(made_run(lone)))
    assert [row[head.index(name)] for name in ("× torch", "% of limit", "GB/s", "max error")] == [""] * 4


def test_a_disturbed_run_says_so():
    assert "Disturbed" not in report.table(made_run(bench("cpu", 1e-3)))
    assert "Disturbed: the load average was 5.0 on 2 cores" in report.table(made_run(bench("cpu", 1e-3), load=5.0))


@pytest.mark.parametrize(
    "seconds, text", [(2.5, "2.5 s"), (1e-3, "1 ms"), (12.34e-6, "12.3 µs"), (5e-9, "5 ns"), (0.0, "0 ns")]
)
def test_duration(seconds, text):
    assert report.duration(seconds) == text


@pytest.mark.parametrize(
    "name, folder",
    [("Intel(R) Xeon(R) Processor", "intel-xeon-processor"), ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
     ("../..", "unknown")],
)  # fmt: skip
def test_slug(name, folder):
    assert report.slug(name) == folder


def test_slim_keeps_what_the_report_reads():
    full = made_run(bench("cpu", 1.23456789e-3), bench("torch", 2e-3))
    small = report.slim(copy.deepcopy(full))
    assert "data" not in json.dumps(small) and "host" not in json.dumps(small) and "someone" not in json.dumps(small)
    assert report.table(small) == report.table(full)
    assert report.slim(small) == small


# ---- comparison


def compare(before, after, **machine):
    return report.compare(made_run(before), made_run(after, **machine), tolerance=0.1)


def test_slower_beyond_tolerance_and_spread_fails():
    result = compare(bench("cpu", 1e-3), bench("cpu", 1.2e-3))
    assert result.failed and result.slower == ["linear M=1 [cpu]: 1 ms -> 1.2 ms, 1.20 times as long"]
    assert str(result).endswith("FAILED: 1 slower, 0 faster, 0 same")


@pytest.mark.parametrize("median", [1.0e-3, 1.09e-3, 0.92e-3])
def test_within_the_tolerance_is_the_same(median):
    result = compare(bench("cpu", 1e-3), bench("cpu", median))
    assert (result.failed, result.same) == (False, 1)


@pytest.mark.parametrize("spreads", [(0.3, 0.02), (0.02, 0.3)])
def test_within_the_spread_of_either_run_is_the_same(spreads):
    before, after = bench("cpu", 1e-3, spread=spreads[0]), bench("cpu", 1.2e-3, spread=spreads[1])
    assert (compare(before, after).failed, compare(before, after).same) == (False, 1)


def test_a_disturbance_is_no_regression():
    """Most rounds were delayed, but the best is as good as ever: something else ran on the machine."""
    assert not compare(bench("cpu", 1e-3), bench("cpu", 3e-3, best=1e-3)).failed


@pytest.mark.parametrize("provider", ["torch", "torch-fp32", "reference"])
def test_torch_is_not_judged(provider):
    """A slower torch is no regression of ours; a slower kernel beside it is."""
    assert not compare(bench(provider, 1e-3), bench(provider, 9e-3)).failed
    both = [made_run(bench(provider, 1e-3), bench("cpu", t)) for t in (1e-3, 9e-3)]
    assert report.compare(*both).failed


def test_faster_is_reported_and_passes():
    result = compare(bench("cpu", 1e-3), bench("cpu", 0.5e-3))
    assert not result.failed and result.faster == ["linear M=1 [cpu]: 1 ms -> 500 µs, 0.50 times as long"]


@pytest.mark.parametrize("other", [{"isa": "native"}, {"threads": 8}, {"device": "AMD EPYC"}])
def test_other_machines_are_shown_and_not_judged(other):
    result = compare(bench("cpu", 1e-3), bench("cpu", 9e-3), **other)
    assert result.slower and not result.comparable and not result.failed
    assert "different machines" in str(result) and "not judged" in str(result)


def test_gpus_are_compared_whatever_their_host():
    gpu = {"kind": "cuda", "device": "NVIDIA H100 80GB HBM3"}
    before, after = made_run(bench("cuda", 1e-6), **gpu), made_run(bench("cuda", 9e-6), threads=8, **gpu)
    assert report.compare(before, after).failed


def test_what_is_in_one_run_only_is_noted():
    result = report.compare(made_run(bench("cpu", 1e-3), bench("cuda", 1e-3)), made_run(bench("cpu", 1e-3)))
    assert not result.failed and result.notes == ["only before: linear M=1 [cuda]"]
    assert "no benchmark in common" in str(compare(bench("cpu", 1.0), bench("cpu", 1.0, group="new")))


def test_command_line(tmp_path, capsys):
    for name, median in (("a", 1e-3), ("b", 2e-3)):
        (tmp_path / name).write_text(json.dumps(made_run(bench("cpu", median))))
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert report.main(["compare", a, a]) == 0
    assert report.main(["compare", a, b]) == 1
    assert report.main(["compare", a, b, "--tolerance", "1.5"]) == 0
    assert report.main(["compare", b, a]) == 0
    assert report.main(["table", a, "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert "| linear M=1 | cpu |" in capsys.readouterr().out


# ---- limits, and the environment of a run


def test_roofs():
    roofs = Roofs(bandwidth=100.0, flops={"float32": 1000.0, "bfloat16": 4000.0})
    assert roofs.seconds(bytes=200, flops=1000, dtype="float32") == 2.0  # memory is the limit
    assert roofs.seconds(bytes=200, flops=8000, dtype="float32") == 8.0  # arithmetic is
    assert roofs.percent(200, 8000, 4.0, "bfloat16") == 50.0
    assert roofs.seconds(0, 8000, "float64") == 2.0  # unknown: the machine's best


def test_isa_holds_every_library():
    base = {"PATH": "x", "N3_CPU_ISA": "generic", "ATEN_CPU_CAPABILITY": "default"}
    assert run.environment("native", None, base) == {"PATH": "x"}
    env = run.environment("avx2", 3, base)
    assert (env["N3_CPU_ISA"], env["ATEN_CPU_CAPABILITY"], env["ONEDNN_MAX_CPU_ISA"]) == ("avx2", "avx2", "AVX2")
    assert env["OMP_NUM_THREADS"] == env["MKL_NUM_THREADS"] == "3" and env["PATH"] == "x"


def test_results_are_kept_by_device_and_date(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "HERE", tmp_path)
    made = made_run(bench("cpu", 1e-3))
    run.write(made, tmp_path / "bench.json")
    run.keep(tmp_path / "bench.json", made, "avx2")
    kept = sorted(path.name for path in (tmp_path / "results" / "intel-xeon-processor").iterdir())
    assert len(kept) == 4 and all("-avx2." in name for name in kept[:3]) and kept[3] == "history.jsonl"


# ---- history


def at_commit(commit: str, day: int, *benchmarks, **machine) -> dict:
    made = made_run(*benchmarks, **machine)
    made["commit_info"] |= {"id": commit, "time": f"2026-01-{day:02}T00:00:00"}
    return made


def test_history_has_a_line_per_commit_machine_and_benchmark(tmp_path):
    for made in (
        at_commit("bbbb", 2, bench("cpu", 2e-3), bench("torch", 5e-3)),
        at_commit("aaaa", 1, bench("cpu", 1e-3)),
        at_commit("bbbb", 2, bench("cpu", 3e-3)),  # again: it replaces its line, and leaves torch's
        at_commit("bbbb", 2, bench("cpu", 4e-3), threads=1),
    ):
        path = history.add(made, tmp_path)
    found = [(line["commit"], line["provider"], line["median"]) for line in history.read(path.parent)]
    assert found == [("aaaa", "cpu", 1e-3), ("bbbb", "cpu", 4e-3), ("bbbb", "cpu", 3e-3), ("bbbb", "torch", 5e-3)]
    assert path.parent.name == "intel-xeon-processor"


def test_a_run_is_judged_by_the_newest_figures_of_its_machine(tmp_path):
    history.add(at_commit("aaaa", 1, bench("cpu", 1e-3), bench("cpu", 1e-3, group="old")), tmp_path)
    history.add(at_commit("bbbb", 2, bench("cpu", 2e-3)), tmp_path)
    history.add(at_commit("cccc", 3, bench("cpu", 9e-3), threads=1), tmp_path)

    def judged(seconds: float) -> report.Comparison:
        after = made_run(bench("cpu", seconds), bench("cpu", 1e-3, group="old"))
        return report.compare(history.newest(after, tmp_path), after)

    assert not judged(2.1e-3).failed and judged(2.1e-3).same == 2
    assert judged(2.5e-3).failed and len(judged(1.1e-3).faster) == 1
    unknown = made_run(bench("cpu", 1.0), device="another")
    assert not report.compare(history.newest(unknown, tmp_path), unknown).failed


def test_history_is_plotted(tmp_path):
    pytest.importorskip("matplotlib")
    results = tmp_path / "results"
    for day, commit in enumerate("ab", 1):
        history.add(at_commit(commit, day, bench("cpu", day * 1e-3), bench("torch", 5e-3)), results)
    made = history.render(tmp_path / "plots", results)
    assert [path.name for path in made] == ["linear.png"]
    assert all(path.stat().st_size > 5000 for path in made)


def test_the_recorded_history_holds_every_recorded_run():
    for folder in (path.parent for path in history.RESULTS.glob("*/*.json")):
        keys = {tuple(line[k] for k in history.KEY) for line in history.read(folder)}
        for path in folder.glob("*.json"):
            missing = {tuple(line[k] for k in history.KEY) for line in history.lines(report.read(path))} - keys
            assert not missing, f"{path.name}: python -m n3kernels.benchmarks.history add {path}"
