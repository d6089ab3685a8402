"""What was measured when: one line per (commit, machine, group, provider) in results/<device>/history.jsonl.

    python -m n3kernels.benchmarks.history add out/bench.json       # a run's lines join the history
    python -m n3kernels.benchmarks.history render --out out/report  # a plot per operator

A later run of the same commit on the same machine replaces its lines. Performance CI compares with the newest line of
each benchmark on its kind of machine, so that no single recorded run has to hold them all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from . import report

__all__ = ["RESULTS", "add", "lines", "newest", "read", "render"]

RESULTS = Path(__file__).parent / "results"
FILE = "history.jsonl"
KEY = ("commit", "machine", "group", "provider")
FACTS = ("median", "best", "spread", "bytes", "flops", "roof_percent")


def lines(run: dict) -> list[dict]:
    """A run as lines of the history."""
    commit = run.get("commit_info", {})
    where = {
        "time": commit.get("time") or run.get("datetime"),
        "commit": str(commit.get("id", "unknown"))[:12] + ("+" if commit.get("dirty") else ""),
        "machine": report.machine_kind(run),
    }
    return [
        {**where, "group": row.group, "provider": row.provider} | {k: _short(getattr(row, k)) for k in FACTS}
        for row in report.rows(run)
    ]


def _short(value: float | None) -> float | None:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read(folder: Path) -> list[dict]:
    """The lines of a device, oldest first."""
    path = folder / FILE
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return sorted(found, key=lambda line: str(line["time"]))


def add(run: dict, results: Path = RESULTS) -> Path:
    """Writes a run's lines to the history of its device; returns the file."""
    folder = results / report.slug(str(report.machine(run).get("device")))
    folder.mkdir(parents=True, exist_ok=True)
    merged = {tuple(line[k] for k in KEY): line for line in [*read(folder), *lines(run)]}
    ordered = sorted(merged.values(), key=lambda line: (str(line["time"]), *(line[k] for k in KEY)))
    path = folder / FILE
    path.write_text("".join(json.dumps(line) + "\n" for line in ordered))
    return path


def newest(run: dict, results: Path = RESULTS) -> dict:
    """The newest lines of what ``run`` measured on its kind of machine, as a run that `report.compare` takes."""
    kind = report.machine_kind(run)
    found = read(results / report.slug(str(report.machine(run).get("device"))))
    asked = {row.key for row in report.rows(run)}
    last = {(line["group"], line["provider"]): line for line in found if line["machine"] == kind}
    last = {key: line for key, line in last.items() if key in asked}
    benchmarks = [
        {
            "group": line["group"], "name": line["group"],
            "extra_info": {k: line[k] for k in ("provider", "bytes", "flops", "roof_percent")},
            "stats": {"median": line["median"], "min": line["best"], "iqr": line["spread"] * line["median"]},
        }
        for line in last.values()
    ]  # fmt: skip
    return {"machine_info": run["machine_info"], "commit_info": {}, "benchmarks": benchmarks}


# ---------------------------------------------------------------- plots


def render(out: Path, results: Path = RESULTS) -> list[Path]:
    """Writes <out>/<device>/<operator>.png: medians over commits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    made = []
    for folder in sorted(path.parent for path in results.glob(f"*/{FILE}")):
        target = out / folder.name
        target.mkdir(parents=True, exist_ok=True)
        found = read(folder)
        operators: dict[str, list[dict]] = {}
        for line in found:
            if line["provider"] in report.JUDGED:
                operators.setdefault(line["group"].split()[0], []).append(line)
        for name, mine in operators.items():
            figure, axes = plt.subplots(figsize=(11, 6), layout="constrained")
            _history(axes, mine)
            axes.set_title(f"{name} on {folder.name}", fontsize=10)
            made.append(target / f"{report.slug(name)}.png")
            figure.savefig(made[-1], dpi=90)
            plt.close(figure)
    return made


def _history(axes, found: Sequence[dict]) -> None:
    """One line per benchmark and kind of machine, with its spread."""
    commits = list(dict.fromkeys(line["commit"] for line in found))
    series: dict[tuple, list[dict]] = {}
    for line in found:
        series.setdefault((line["group"], line["provider"], line["machine"]), []).append(line)
    for (group, provider, machine), mine in series.items():
        xs = [commits.index(line["commit"]) for line in mine]
        ys = [line["median"] for line in mine]
        room = [line["median"] * line["spread"] / 2 for line in mine]
        axes.errorbar(xs, ys, yerr=room, marker="o", markersize=3, linewidth=1, label=f"{group} [{provider}] {machine}")
    axes.set_yscale("log")
    axes.set_ylabel("median, s")
    axes.set_xticks(range(len(commits)), commits, rotation=60, fontsize=7)
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))


# ---------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="history", description="The history of the benchmarks.")
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="add runs to the history of their devices")
    adding.add_argument("runs", nargs="+", type=Path)
    rendering = commands.add_parser("render", help="plot the history of every operator")
    rendering.add_argument("--out", type=Path, default=Path("out/report"))
    options = parser.parse_args(argv)
    if options.command == "add":
        for path in options.runs:
            print(add(report.read(path)))
        return 0
    made = render(options.out)
    print(f"{len(made)} plots in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
