"""The gallery: every figure is drawn from data, every number of a caption is that data's, the page is up to date."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
from n3kernels.benchmarks import facts, gallery, history, run

matplotlib = pytest.importorskip("matplotlib")

ROOT = Path(__file__).parent.parent
ROOFS = {"bandwidth": 2e10, "flops": {"float32": 2e11, "bfloat16": 8e11}, "source": "measured"}
ORIGIN = {"machine": "Some Processor", "commit": "0123456789ab", "torch": "2.13.0", "date": "2026-01-02"}
DRIFT = {
    "origin": ORIGIN, "memory": [600, 2], "window": 64, "tokens": [512, 8192],
    "error": {
        "float32, nearest": [[1e-7, 1e-7], [3.1e-7, 1e-7]],
        "int8, stochastic": [[1e-2, 1e-2], [4.7e-2, 1e-2]],
        "float16, ring of 32": [[1e-4, 1e-4], [1e-4, 1e-4]],
    },
}  # fmt: skip
ERRORS = {
    "origin": ORIGIN, "shape": [8, 16, 32],
    "recipes": {"nearest": {"normal": 0.0951, "heavy": 0.09}, "16x16 blocks": {"normal": 0.1234, "heavy": 0.2}},
    "products": {"W4A16": {"normal": 0.0777, "heavy": 0.1}, "W4A4": {"normal": 0.1555, "heavy": 0.2}},
}  # fmt: skip


def line(group: str, provider: str, median: float, commit: str = "aaaa", **facts) -> dict:
    where = {"time": f"2026-01-01 {commit}", "commit": commit, "machine": "Some Processor 6/1/1, avx2, 2 threads"}
    work = {"best": median, "spread": 0.01, "bytes": 1_000_000, "flops": 4_000_000, "roof_percent": 33.3}
    return {**where, "group": group, "provider": provider, "median": median, **work, **facts}


LINES = [
    line("nvfp4_linear M=1", "cpu", 1e-3), line("nvfp4_linear M=1", "torch", 2.5e-3),
    line("nvfp4_linear M=1", "torch-fp32", 2e-3), line("nvfp4_linear M=1", "reference", 9e-3),
    line("nvfp4_linear M=8", "cpu", 4e-3), line("nvfp4_linear M=8", "torch", 3e-3),
    line("nvfp4_quantize 1", "cpu", 1e-5, roof_percent=87.5), line("nvfp4_quantize 1", "reference", 1.7e-4),
    line("ssd_scan L=64", "cpu", 1e-3), line("ssd_scan L=64", "transformers", 8e-3),
    line("ssd_scan L=64", "reference", 5e-3), line("ssd_scan L=64", "parts", 1e-9),
    line("moe_route T=1", "cpu", 1e-3, "old"), line("moe_route T=1", "torch", 7e-3, "old"),
    line("moe_route T=1", "cpu", 1e-3, "zzzz"), line("moe_route T=1", "torch", 3e-3, "zzzz"),
    line("transformers prefill", "n3", 1e-3), line("transformers prefill", "torch", 3e-3),
]  # fmt: skip


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "results" / "some-processor"
    folder.mkdir(parents=True)
    (folder / history.FILE).write_text("".join(json.dumps(entry) + "\n" for entry in LINES))
    cpu = {"family": 6, "model": 1, "stepping": 1}
    machine = {"kind": "cpu", "device": "Some Processor", "isa": "avx2", "threads": 2, "cpu": cpu, "roofs": ROOFS}
    run = {"machine_info": {"n3": machine}, "datetime": "2026-01-02", "benchmarks": []}
    (folder / "2026-01-02-avx2.json").write_text(json.dumps(run))
    (tmp_path / "results" / "state_drift.json").write_text(json.dumps(DRIFT))
    (tmp_path / "results" / "quantization_error.json").write_text(json.dumps(ERRORS))
    return tmp_path / "results"


def test_every_figure_is_drawn_and_on_the_page(results, tmp_path):
    *drawn, page = gallery.render(tmp_path / "out", results)
    names = ["speedup-nvfp4-some-processor-avx2", "speedup-mamba-some-processor-avx2",
             "speedup-moe-some-processor-avx2", "roofline-some-processor-avx2", "state-drift", "quantization-error",
             "product-error"]  # fmt: skip
    assert [path.stem for path in drawn] == names
    linked = re.findall(r"\]\((gallery/.*?)\)", page.read_text())
    assert linked == [f"gallery/{name}.svg" for name in names]
    for path in drawn:
        text = path.read_text()
        assert text.startswith("<?xml") and "</svg>" in text and len(text) < 100_000
    assert "nvfp4_quantize" in drawn[0].read_text() and "16x16 blocks" in drawn[5].read_text()
    again = gallery.render(tmp_path / "again", results)
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in (*drawn, page)]


def test_captions_are_made_of_the_data(results):
    captions = {figure.name: figure.caption for figure in gallery.figures(results)}
    expected = {
        "speedup-nvfp4-some-processor-avx2": (
            "Some Processor 6/1/1, avx2, 2 threads", "commit aaaa", "(3 of them)", "0.75 to 2 times", "median 1.38",
            "1 of 2 slower", "(hollow): 17 times", "0 of 1 slower",
        ),
        "speedup-mamba-some-processor-avx2": ("(hollow): 5 times",),  # the definition beats transformers, parts is ours
        "speedup-moe-some-processor-avx2": ("commit zzzz", "(filled): 3 times"),  # the newest commit alone
        "roofline-some-processor-avx2": (
            "20 GB/s", "200 GFLOP/s (float32), 800 GFLOP/s (bfloat16)", "5 benchmarks", "33.3 %",
            "87.5 % (nvfp4_quantize 1)", "median 33.3 %",
        ),
        "state-drift": ("600 and 2 tokens", "last 64 tokens", "After 8192", "0.047 (int8, stochastic)",
                        "3.1e-07 (float32, nearest)", "commit 0123456789ab"),
        "quantization-error": ("[8, 32]", "0.0951 (nearest) at least", "0.123 (16x16 blocks)", "Some Processor"),
        "product-error": ("W [16, 32]", "W4A16: 0.0777; W4A4: 0.155", "torch 2.13.0"),
    }  # fmt: skip
    assert captions.keys() == expected.keys()
    for name, parts in expected.items():
        for part in parts:
            assert part in captions[name], f"{part!r} is not in {captions[name]!r}"


def test_the_report_includes_it(results, tmp_path, monkeypatch, capsys):
    for module in (run.history, run.gallery):
        monkeypatch.setattr(module, "render", partial(module.render, results=results))
    assert run.main(["--report", "--out", str(tmp_path)]) == 0
    made = {str(path.relative_to(tmp_path / "report")) for path in (tmp_path / "report").rglob("*.*")}
    assert {"gallery.md", "gallery/state-drift.svg", "some-processor/nvfp4-linear.png"} <= made
    assert f"{len(made)} files in" in capsys.readouterr().out


def test_nothing_recorded_makes_an_empty_page(tmp_path):
    assert [path.name for path in gallery.render(tmp_path / "out", tmp_path)] == ["gallery.md"]


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="needs a source tree")
def test_the_committed_page_is_of_the_recorded_data():
    """After new records: python -m n3kernels.benchmarks.gallery docs"""
    page = (ROOT / "docs" / "gallery.md").read_text()
    figures = gallery.figures(ROOT / "benchmarks" / "results")
    assert len(figures) >= 4
    for figure in figures:
        assert f"![{figure.title}](gallery/{figure.name}.svg)\n\n{gallery._wrap(figure.caption)}\n" in page
        assert (ROOT / "docs" / "gallery" / f"{figure.name}.svg").is_file()
    assert {path.stem for path in (ROOT / "docs" / "gallery").iterdir()} == {figure.name for figure in figures}


def test_measurements_are_kept_with_their_origin(tmp_path):
    facts.keep(tmp_path / "new" / "x.json", {"tokens": [1, 2], "error": {"a": [[1.23456789e-7, 2.0]]}})
    text = (tmp_path / "new" / "x.json").read_text()
    kept = json.loads(text)
    assert kept["error"] == {"a": [[1.235e-7, 2.0]]} and kept["tokens"] == [1, 2]
    assert '"tokens": [1, 2]' in text and "[1.235e-07, 2.0]" in text
    assert {"machine", "commit", "torch", "n3kernels", "date"} == kept["origin"].keys()
