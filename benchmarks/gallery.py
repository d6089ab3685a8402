"""The figures of docs/gallery.md, each from a file under benchmarks/results, and the page itself.

    python -m n3kernels.benchmarks.gallery docs    # docs/gallery.md and docs/gallery/*.svg, as they are committed

A caption is made of the data that its figure shows, with machine and commit, so that no number can outlive its data.
Colours are Okabe and Ito's, which colour-blind readers can tell apart; every series has a marker of its own besides.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from n3kernels._dispatch import OPS

from . import history, report

__all__ = ["Figure", "figures", "render"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
PLAIN = ("torch", "transformers", "reference")  # how providers in plain PyTorch are called
FAMILIES = ("nvfp4", "mamba", "moe", "mtp")
STYLE = {
    "svg.fonttype": "none",  # text stays text: small files, searchable
    "svg.hashsalt": "n3kernels",  # the same names inside on every run
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Arial", "sans-serif"], "font.size": 9,
    "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One picture: how it is drawn, and what is said of it."""

    name: str  # of the file, without suffix
    title: str
    caption: str
    draw: Callable  # takes a matplotlib figure


def figures(results: Path = history.RESULTS) -> list[Figure]:
    """What can be drawn from the files that are there."""
    found: list[Figure] = []
    for folder in sorted(path.parent for path in results.glob(f"*/{history.FILE}")):
        lines = history.read(folder)
        found += [*_speedups(folder.name, lines), *_rooflines(folder, lines)]
    for name, make in (("state_drift", _drift), ("quantization_error", _quantization)):
        path = results / f"{name}.json"
        found += make(report.read(path)) if path.is_file() else []
    return found


def render(out: Path, results: Path = history.RESULTS) -> list[Path]:
    """Writes <out>/gallery.md and <out>/gallery/<figure>.svg; returns what was written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder, made, page = out / "gallery", [], [HEAD]
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures(results):
        with plt.rc_context(STYLE):
            canvas = plt.figure(layout="constrained")
            figure.draw(canvas)
            made.append(folder / f"{figure.name}.svg")
            canvas.savefig(made[-1], metadata={"Date": None, "Creator": None})
            plt.close(canvas)
            made[-1].write_text(re.sub(r"\d+\.\d{3,}", lambda n: f"{float(n[0]):.2f}", made[-1].read_text()))  # points
        page.append(f"## {figure.title}\n\n![{figure.title}](gallery/{figure.name}.svg)\n\n{_wrap(figure.caption)}\n")
    made.append(out / "gallery.md")
    made[-1].write_text("\n".join(page))
    return made


HEAD = """# Gallery

Drawn from the files in `benchmarks/results` by `python -m n3kernels.benchmarks.gallery docs`; a test compares this page
with them. `n3kernels bench --report` draws the same from the figures of your own machine (`make bench SAVE=1` records
them). No GPU has been measured yet. A commit with a + had changes that were not committed.
"""


def _wrap(text: str, width: int = 120) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += " " * bool(lines[-1]) + word
    return "\n".join(lines)


# ---------------------------------------------------------------- speed-ups


@dataclass(frozen=True)
class Ratio:
    """A kernel's newest figure beside the baseline of the same run."""

    operator: str
    group: str
    commit: str
    ratio: float
    of_torch: bool  # else of this library's own definition, the fastest or the only one there


def ratios(lines: Sequence[dict]) -> list[Ratio]:
    """Newest commit of each benchmark; the baseline is the fastest plain PyTorch of that very run, whoever wrote it."""
    newest: dict[str, list[dict]] = {}
    for line in lines:  # oldest first
        mine = newest.setdefault(line["group"], [])
        if mine and mine[0]["commit"] != line["commit"]:
            mine.clear()
        mine.append(line)
    found = []
    for group, members in newest.items():
        plain = [line for line in members if line["provider"].startswith(PLAIN)]
        for line in members if plain else ():
            if line["provider"] in report.JUDGED:
                base = min(plain, key=lambda other: other["median"])
                ratio, ours = base["median"] / line["median"], base["provider"] == "reference"
                found.append(Ratio(group.split()[0], group, line["commit"], ratio, not ours))
    return found


def family(operator: str) -> str | None:
    """The family of an operator's name; None for what is no operator, such as a whole model."""
    return OPS[operator].check.__module__.split(".")[1] if operator in OPS else None


def _by_machine(lines: Sequence[dict]) -> Iterator[tuple[str, list[dict]]]:
    for machine in dict.fromkeys(line["machine"] for line in lines):
        yield machine, [line for line in lines if line["machine"] == machine]


def _speedups(device: str, lines: Sequence[dict]) -> Iterator[Figure]:
    for machine, mine in _by_machine(lines):
        everything = ratios(mine)
        for which in FAMILIES:
            shown = [ratio for ratio in everything if family(ratio.operator) == which]
            if shown:
                yield _speedup(device, machine, which, shown)


def _speedup(device: str, machine: str, which: str, shown: list[Ratio]) -> Figure:
    caption = f"{machine}; {_commits(r.commit for r in shown)}. A point is a benchmark ({len(shown)} of them). "
    for of_torch, against in (
        (True, "the fastest plain PyTorch of the same run, torch's own operators or transformers' code (filled)"),
        (False, "this library's definition in plain PyTorch, where that is the fastest or the only one (hollow)"),
    ):
        found = [r.ratio for r in shown if r.of_torch == of_torch]
        if found:
            slower = sum(ratio < 1 for ratio in found)
            span = " to ".join(dict.fromkeys(map(_number, (min(found), max(found)))))
            caption += (
                f"Against {against}: {span} times as fast, median {_number(statistics.median(found))}; "
                f"{slower} of {len(found)} slower. "
            )
    name = f"speedup-{which}-{_suffix(device, machine)}"
    return Figure(name, f"Speed-up, {which}: {_short(machine)}", caption, lambda canvas: _draw_speedup(canvas, shown))


def _draw_speedup(canvas, shown: list[Ratio]) -> None:
    operators = list(dict.fromkeys(r.operator for r in shown))
    canvas.set_size_inches(8, 1.3 + 0.32 * len(operators))
    axes = canvas.add_subplot()
    for of_torch, colour, label in ((True, COLOURS[0], "× fastest plain PyTorch"), (False, COLOURS[1], "× definition")):
        points = [(r.ratio, -operators.index(r.operator)) for r in shown if r.of_torch == of_torch]
        if points:
            face = colour if of_torch else "none"
            marker = "o" if of_torch else "s"
            axes.plot(*zip(*points, strict=True), marker, color=colour, markerfacecolor=face, markersize=5, label=label)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    _plain_ticks(axes.xaxis)
    axes.set_yticks([-i for i in range(len(operators))], operators)
    axes.set_ylim(0.6 - len(operators), 0.6)
    axes.set_xlabel("times as fast (log scale); right of the line is faster")
    canvas.legend(loc="outside upper center", ncols=2, frameon=False)


# ---------------------------------------------------------------- rooflines


def _rooflines(folder: Path, lines: Sequence[dict]) -> Iterator[Figure]:
    """One per kind of machine: its own kernels under the limits of its newest recorded run."""
    runs = sorted((report.read(path) for path in folder.glob("*.json")), key=lambda run: str(run.get("datetime")))
    limits = {report.machine_kind(run): report.machine(run).get("roofs") for run in runs}
    for machine, mine in _by_machine(lines):
        last = {(line["group"], line["provider"]): line for line in mine if line["provider"] in report.JUDGED}
        points = [line for line in last.values() if line["flops"] and line["bytes"] and family(_operator(line))]
        if limits.get(machine) and points:
            yield _roofline(folder.name, machine, limits[machine], points)


def _operator(line: dict) -> str:
    return line["group"].split()[0]


def _roofline(device: str, machine: str, limit: dict, points: list[dict]) -> Figure:
    percents = {line["group"]: line["roof_percent"] for line in points if line["roof_percent"] is not None}
    peaks = ", ".join(f"{_number(v / 1e9)} GFLOP/s ({k})" for k, v in _peaks(limit).items())
    caption = (
        f"{machine}; {_commits(line['commit'] for line in points)}. Limits ({limit['source']}): "
        f"{_number(limit['bandwidth'] / 1e9)} GB/s, {peaks}. {len(points)} benchmarks"
    )
    if percents:
        least, most = (choose(percents, key=percents.__getitem__) for choose in (min, max))
        caption += (
            "; of the limit that binds, as their own run measured it, they reach "
            f"{_number(percents[least])} % ({least}) to {_number(percents[most])} % ({most}), median "
            f"{_number(statistics.median(percents.values()))} %. Above 100 % the data was in a cache"
        )
    caption += ". Bytes are the least traffic, FLOP what the definition asks for."

    def draw(canvas) -> None:
        canvas.set_size_inches(8, 5)
        axes = canvas.add_subplot()
        rows = [report.Row(**{k: line[k] for k in ("group", "provider", *history.FACTS)}) for line in points]
        for i, which in enumerate(FAMILIES):
            mine = [row for row in rows if family(row.group.split()[0]) == which]
            xs, ys = [row.flops / row.bytes for row in mine], [row.flops / row.median / 1e9 for row in mine]
            if mine:
                axes.loglog(xs, ys, MARKERS[i], color=COLOURS[i], markersize=5, label=which, markerfacecolor="none")
        intensities = [row.flops / row.bytes for row in rows]
        low, high, bandwidth = min(intensities) / 2, max(intensities) * 4, limit["bandwidth"]
        for dtypes, peak in _peaks(limit).items():
            corners = [low, *(x for x in [peak / bandwidth] if low < x < high), high]
            axes.loglog(corners, [min(peak, x * bandwidth) / 1e9 for x in corners], color="black", linewidth=1)
            axes.annotate(dtypes, (high, min(peak, high * bandwidth) / 1e9), fontsize=7, ha="right", va="bottom")
        axes.minorticks_off()
        axes.set_xlabel("FLOP per byte of least traffic (log scale)")
        axes.set_ylabel("GFLOP/s (log scale)")
        axes.legend(loc="lower right")

    return Figure(f"roofline-{_suffix(device, machine)}", f"Roofline: {_short(machine)}", caption, draw)


def _peaks(limit: dict) -> dict[str, float]:
    """Names of the dtypes that share a limit -> FLOP/s."""
    by_rate: dict[float, list[str]] = {}
    for dtype, peak in limit["flops"].items():
        by_rate.setdefault(peak, []).append(dtype)
    return {", ".join(dtypes): peak for peak, dtypes in by_rate.items()}


# ---------------------------------------------------------------- drift of states


def _drift(data: dict) -> list[Figure]:
    tokens, memory, errors = data["tokens"], data["memory"], data["error"]
    last = {name: by_end[-1] for name, by_end in errors.items()}
    worst, best = (choose(last, key=lambda name: last[name][0]) for choose in (max, min))
    caption = (
        f"RMS error of y relative to its RMS, over the last {data['window']} tokens, for heads that remember about "
        f"{_words(memory)} tokens; states rounded after every token, or once in a ring. After {tokens[-1]} tokens the "
        f"longest memory is off by {last[worst][0]:.2g} ({worst}) at most and {last[best][0]:.2g} ({best}) at least. "
        + _origin(data)
    )

    def draw(canvas) -> None:
        canvas.set_size_inches(10, 4.6)
        panels = canvas.subplots(1, len(memory), sharey=True)
        dtypes = list(dict.fromkeys(name.split(",")[0] for name in errors))
        for head, axes in enumerate(panels):
            for name, by_end in errors.items():
                dtype, how = name.split(", ")
                i = dtypes.index(dtype)
                line = "-" if how == "nearest" else "--" if how == "stochastic" else ":"
                axes.loglog(
                    tokens, [end[head] for end in by_end], line, marker=MARKERS[i], markersize=3.5, color=COLOURS[i],
                    linewidth=1.2, label=name, markerfacecolor="none",
                )  # fmt: skip
            axes.minorticks_off()
            axes.set_title(f"memory of {memory[head]} tokens", fontsize=9)
            axes.set_xlabel("tokens decoded (log scale)")
        panels[0].set_ylabel("relative RMS error of y (log scale)")
        canvas.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)

    return [Figure("state-drift", "Drift of Mamba-2 states in fewer bits", caption, draw)]


# ---------------------------------------------------------------- quantisation error

KINDS = {"normal": "normal", "heavy": "Student's t, 3 degrees", "channels": "outlier channels"}


def _quantization(data: dict) -> list[Figure]:
    rows, outputs, k = data["shape"]
    recipes, products = data["recipes"], data["products"]
    on_normal = {name: by_kind["normal"] for name, by_kind in recipes.items()}
    best, worst = (choose(on_normal, key=on_normal.__getitem__) for choose in (min, max))
    how = (
        "Inputs: normal numbers, Student's t with 3 degrees of freedom, and normal numbers with a factor per channel, "
        "20 for one channel in 128 (examples/quantization_error.py). "
    )
    of_recipes = (
        f"Relative L2 error of [{rows}, {k}] after NVFP4 and back. On normal data {on_normal[best]:.3g} ({best}) at "
        f"least, {on_normal['nearest']:.3g} to nearest, {on_normal[worst]:.3g} ({worst}) at most. {how}{_origin(data)}"
    )
    of_products = (
        f"Relative L2 error of X W^T, X [{rows}, {k}], W [{outputs}, {k}] normal, against float64. On normal X "
        + "; ".join(f"{name}: {products[name]['normal']:.3g}" for name in products)
        + f". {how}{_origin(data)}"
    )
    return [
        Figure("quantization-error", "Error of the NVFP4 recipes", of_recipes,
               lambda canvas: _dots(canvas, recipes, "relative L2 error of the quantised tensor")),
        Figure("product-error", "Error of products with NVFP4 operands", of_products,
               lambda canvas: _dots(canvas, products, "relative L2 error of the product")),
    ]  # fmt: skip


def _dots(canvas, table: dict[str, dict[str, float]], label: str) -> None:
    canvas.set_size_inches(8, 1.3 + 0.32 * len(table))
    axes, names = canvas.add_subplot(), list(table)
    for i, kind in enumerate(table[names[0]]):
        values = [table[name][kind] for name in names]
        axes.plot(
            values, [-n for n in range(len(names))], MARKERS[i], color=COLOURS[i], markersize=6,
            label=KINDS.get(kind, kind), markerfacecolor="none", markeredgewidth=1.4,
        )  # fmt: skip
    axes.set_xlim(left=0)
    axes.set_yticks([-n for n in range(len(names))], names)
    axes.set_xlabel(label)
    canvas.legend(loc="outside upper center", ncols=3, frameon=False)


# ---------------------------------------------------------------- words and numbers


def _number(value: float) -> str:
    """Three digits at most, no exponent up to a million."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _words(values: Sequence) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last


def _commits(commits) -> str:
    found = list(dict.fromkeys(commits))
    return f"commit{'s' * (len(found) > 1)} {_words(found)}"


def _origin(data: dict) -> str:
    origin = data["origin"]
    return f"{origin['machine']}, commit {origin['commit']}, torch {origin['torch']}."


def _short(machine: str) -> str:
    """What tells the kinds of one device apart: "..., avx2, 2 threads" -> "avx2, 2 threads"."""
    return machine.split(", ", 1)[-1]


def _suffix(device: str, machine: str) -> str:
    kind = report.slug(_short(machine).split(",")[0]) if "," in machine else ""
    return f"{device}-{kind}" if kind else device


def _plain_ticks(axis) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(LogLocator(base=10, subs=()))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gallery", description="Draws the recorded figures.")
    parser.add_argument("out", type=Path, help="folder of gallery.md and gallery/*.svg")
    made = render(parser.parse_args(argv).out)
    print(f"{len(made) - 1} figures in {made[-1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
