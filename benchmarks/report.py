"""From the JSON of a benchmark run to a table, a plot, and the comparison of two runs.

    python -m n3kernels.benchmarks.report table out/bench.json
    python -m n3kernels.benchmarks.report compare before.json after.json --tolerance 0.1

A ratio is the baseline's median time over the provider's: above 1 the provider is faster. The baseline of a group is
its fastest plain torch, so that a slow torch path flatters nobody, or the reference where torch has no such operator.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Comparison", "Row", "compare", "machine_kind", "plot", "read", "roofline", "rows", "slim", "slug", "table"]

LEGEND = (
    "Time is the median, the spread half the interquartile range. × torch: the time of the fastest plain torch of the "
    "group over the row's (the reference's, where torch has no such operator)."
)
KEPT = ("min", "max", "mean", "stddev", "median", "iqr", "rounds", "iterations")


# ---------------------------------------------------------------- reading a run


JUDGED = ("cpu", "triton", "cuda", "n3 function", "n3 operator")  # providers whose time this library answers for


@dataclass(frozen=True)
class Row:
    """One provider of one group; times in seconds."""

    group: str
    provider: str
    median: float
    best: float
    spread: float  # interquartile range over the median
    bytes: int = 0
    flops: int = 0
    roof_percent: float | None = None
    max_error: float | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.group, self.provider


def read(path: str | Path) -> dict:
    return json.loads(Path(path).read_text())


def rows(run: dict) -> list[Row]:
    """The rows of a run, groups in the order in which they ran."""
    result = []
    for b in run["benchmarks"]:
        stats, extra = b["stats"], b.get("extra_info", {})
        result.append(
            Row(
                group=b["group"] or b["name"],
                provider=extra.get("provider", b["name"]),
                median=stats["median"],
                best=stats["min"],
                spread=stats["iqr"] / stats["median"] if stats["median"] else 0.0,
                bytes=extra.get("bytes", 0),
                flops=extra.get("flops", 0),
                roof_percent=extra.get("roof_percent"),
                max_error=extra.get("max_error"),
            )
        )
    return result


def groups(all_rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by group, in order of first appearance."""
    by_group: dict[str, list[Row]] = {}
    for row in all_rows:
        by_group.setdefault(row.group, []).append(row)
    return list(by_group.items())


def baseline(members: Sequence[Row]) -> Row | None:
    """The fastest plain torch of a group, else its reference."""
    torches = [row for row in members if row.provider.startswith("torch")]
    references = [row for row in members if row.provider == "reference"]
    return min(torches or references, key=lambda row: row.median, default=None)


def machine(run: dict) -> dict:
    return run.get("machine_info", {}).get("n3", {})


def machine_kind(run: dict) -> str:
    """What must be equal for two runs to be comparable: the GPU; or the processor, its instruction set and threads."""
    m = machine(run)
    if m.get("kind") == "cuda":
        return str(m.get("device"))
    cpu = m.get("cpu", {})
    model = "/".join(str(cpu.get(k)) for k in ("family", "model", "stepping"))
    return f"{m.get('device')} {model}, {m.get('isa')}, {m.get('threads')} threads"


def slim(run: dict) -> dict:
    """A run without its single measurements and host names: small enough, and fit, to be committed."""
    info = {k: v for k, v in run["machine_info"].items() if k in ("python_version", "system", "machine", "n3")}
    commit = {k: v for k, v in run.get("commit_info", {}).items() if k in ("id", "dirty", "time")}
    benchmarks = [
        {
            "group": b["group"],
            "name": b["name"],
            "extra_info": _rounded(b.get("extra_info", {})),
            "stats": _rounded({k: b["stats"][k] for k in KEPT if k in b["stats"]}),
        }
        for b in run["benchmarks"]
    ]
    return {"machine_info": info, "commit_info": commit, "datetime": run.get("datetime"), "benchmarks": benchmarks}


def _rounded(values: dict) -> dict:
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}


def slug(name: str) -> str:
    """A device's name as a folder's: "Intel(R) Xeon(R) Processor" becomes intel-xeon-processor."""
    name = re.sub(r"\((r|tm|c)\)", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown"


# ---------------------------------------------------------------- table


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def table(run: dict) -> str:
    """The run in Markdown: its conditions, then one table with a row for every provider of every group."""
    lines = [*_conditions(run), ""]
    lines.append("| group | provider | median | best | spread | × torch | % of limit | GB/s | GFLOP/s | max error |")
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for group, members in groups(rows(run)):
        base = baseline(members)
        for row in members:
            name = f"{row.provider} (baseline)" if row is base else row.provider
            cells = [
                name, duration(row.median), duration(row.best), f"±{50 * row.spread:.0f} %",
                f"{base.median / row.median:.2f}" if base else "", _number(row.roof_percent, ".0f"),
                _number(row.bytes / row.median / 1e9, ".1f"), _number(row.flops / row.median / 1e9, ".0f"),
                _number(row.max_error, ".2g", zero="0"),
            ]  # fmt: skip
            lines.append("| " + " | ".join([group, *cells]) + " |")
            group = ""
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str, zero: str = "") -> str:
    return "" if value is None else format(value, form) if value else zero


def _conditions(run: dict) -> list[str]:
    m = machine(run)
    limit = m.get("roofs", {})
    lines = [f"Device: {machine_kind(run)}; torch {m.get('torch')}; n3kernels {m.get('n3kernels')}, "
             f"commit {run.get('commit_info', {}).get('id', 'unknown')[:12]}"]  # fmt: skip
    if limit:
        flops = ", ".join(f"{k} {v / 1e12:.3g} TFLOP/s" for k, v in limit.get("flops", {}).items())
        lines.append(f"Limits ({limit.get('source')}): {limit['bandwidth'] / 1e9:.4g} GB/s; {flops}")
    load, cores = m.get("load"), m.get("cpu", {}).get("count")
    if load and cores and load > 0.5 * cores:
        lines.append(f"**Disturbed: the load average was {load:.1f} on {cores} cores before the run began.**")
    return [*lines, LEGEND]


# ---------------------------------------------------------------- comparison


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side. ``failed`` is what performance CI looks at."""

    slower: list[str]
    faster: list[str]
    same: int
    notes: list[str]
    comparable: bool

    @property
    def failed(self) -> bool:
        return self.comparable and bool(self.slower)

    def __str__(self) -> str:
        lines = [f"slower: {line}" for line in self.slower] + [f"faster: {line}" for line in self.faster]
        lines += [f"note: {note}" for note in self.notes]
        verdict = "FAILED" if self.failed else "ok" if self.comparable else "not judged"
        return "\n".join([*lines, f"{verdict}: {len(self.slower)} slower, {len(self.faster)} faster, {self.same} same"])


def compare(before: dict, after: dict, tolerance: float = 0.1) -> Comparison:
    """Judges ``after`` against ``before``.

    A row is slower if its median is, by more than ``tolerance`` and by more than the spread of either run, and if its
    best round is slower by more than ``tolerance`` too: what else happens on a machine delays many rounds, but not
    all of them. Faster is the mirror image. Runs on machines of different kinds are shown and not judged.

    Only kernels of this library are judged. torch's time, and the reference's, which is torch's too, follow its version
    and its allocator: the reference was seen to take three times as long in another process on the same machine.
    """
    old, new = ({row.key: row for row in rows(run) if row.provider in JUDGED} for run in (before, after))
    slower, faster, same = [], [], 0
    for key in (k for k in old if k in new):
        a, b = old[key], new[key]
        room = 1 + max(tolerance, a.spread, b.spread)
        times = f"{duration(a.median)} -> {duration(b.median)}, {b.median / a.median:.2f} times as long"
        line = f"{key[0]} [{key[1]}]: {times}"
        if b.median > a.median * room and b.best > a.best * (1 + tolerance):
            slower.append(line)
        elif a.median > b.median * room and a.best > b.best * (1 + tolerance):
            faster.append(line)
        else:
            same += 1
    kinds = machine_kind(before), machine_kind(after)
    notes = []
    if kinds[0] != kinds[1]:
        notes.append(f"different machines, nothing is judged: {kinds[0]} before, {kinds[1]} after")
    for what, keys in (("only before", old.keys() - new.keys()), ("only after", new.keys() - old.keys())):
        if keys:
            notes.append(f"{what}: " + ", ".join(f"{group} [{provider}]" for group, provider in sorted(keys)))
    if not old.keys() & new.keys():
        notes.append("the runs have no benchmark in common")
    return Comparison(slower, faster, same, notes, kinds[0] == kinds[1])


# ---------------------------------------------------------------- plot


def plot(run: dict, path: str | Path) -> None:
    """Ratio bars and the roofline of a run, as one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    all_rows = rows(run)
    names = sorted({row.provider for row in all_rows})
    colours = dict(zip(names, plt.get_cmap("tab10").colors * 2, strict=False))
    figure, (left, right) = plt.subplots(1, 2, figsize=(16, max(5, 0.17 * len(all_rows))), layout="constrained")
    _ratio_bars(left, all_rows, colours)
    roofline(right, machine(run).get("roofs", {}), [row for row in all_rows if row.flops and row.bytes], colours)
    figure.suptitle(machine_kind(run), fontsize=10)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _ratio_bars(axes, all_rows: Sequence[Row], colours: dict) -> None:
    """A bar from 1 to the ratio for every row but the baselines, groups from top to bottom."""
    position, ticks, labels = 0.0, [], {}
    for group, members in groups(all_rows):
        base = baseline(members)
        bars = [row for row in members if base and row is not base]
        for i, row in enumerate(bars):
            ratio = base.median / row.median
            bar = axes.barh(position - i, ratio - 1, left=1, color=colours[row.provider], height=0.9)
            labels.setdefault(row.provider, bar)
        if bars:
            ticks.append((position - (len(bars) - 1) / 2, f"{group} (1 = {base.provider})"))
            position -= len(bars) + 0.7
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("speed relative to the baseline (log scale)")
    axes.margins(y=0.01)
    if labels:
        axes.legend(labels.values(), labels.keys(), fontsize=8, loc="best")


def roofline(axes, limit: dict, points: Sequence[Row], colours: dict | None = None) -> None:
    """Rate of every row with arithmetic over its intensity, under the machine's limits."""
    for name in dict.fromkeys(row.provider for row in points):
        mine = [row for row in points if row.provider == name]
        xs, ys = [row.flops / row.bytes for row in mine], [row.flops / row.median for row in mine]
        axes.loglog(xs, ys, "o", color=colours and colours[name], label=name, markersize=4)
    if limit and points:
        intensities = [row.flops / row.bytes for row in points]
        low, high = min(intensities) / 2, max(intensities) * 4
        peaks: dict[float, list[str]] = {}
        for dtype, peak in limit["flops"].items():
            peaks.setdefault(peak, []).append(dtype)
        for peak, dtypes in peaks.items():
            corners = [low, *(x for x in [peak / limit["bandwidth"]] if low < x < high), high]
            axes.loglog(corners, [min(peak, x * limit["bandwidth"]) for x in corners], color="grey", linewidth=0.8)
            top = min(peak, high * limit["bandwidth"])
            axes.annotate(", ".join(dtypes), (high, top), fontsize=7, ha="right", va="bottom")
    axes.set_xlabel("FLOP per byte of least traffic")
    axes.set_ylabel("FLOP/s")
    if points:
        axes.legend(fontsize=8, loc="lower right")


# ---------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="report", description="Tables and comparisons of benchmark runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("table", help="print a run as a Markdown table")
    show.add_argument("run")
    show.add_argument("--plot", help="write the plot to this PNG file")
    versus = commands.add_parser("compare", help="judge a run against an earlier one; exit 1 if something is slower")
    versus.add_argument("before")
    versus.add_argument("after")
    versus.add_argument("--tolerance", type=float, default=0.1, help="relative slowdown that is allowed (default: 0.1)")
    options = parser.parse_args(argv)
    if options.command == "table":
        print(table(read(options.run)))
        if options.plot:
            plot(read(options.run), options.plot)
        return 0
    result = compare(read(options.before), read(options.after), options.tolerance)
    print(result)
    return int(result.failed)


if __name__ == "__main__":
    sys.exit(main())
