"""Runs the benchmarks and renders the report: what ``make bench`` and ``n3kernels bench`` call.

    python -m n3kernels.benchmarks.run -k nvfp4_linear --isa avx2 --out out

The benchmarks run in a process of their own, so that the instruction set is in its environment before torch is there.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from . import gallery, history, report

__all__ = ["ISAS", "environment", "main"]

HERE = Path(__file__).parent

# Instruction set -> what holds n3kernels, ATen, oneDNN and MKL to it. Each reads its variable once, when it loads.
ISAS = {
    "native": {},
    "amx": {
        "N3_CPU_ISA": "amx", "ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx512": {
        "N3_CPU_ISA": "avx512", "ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx2": {
        "N3_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}  # fmt: skip


def environment(isa: str, threads: int | None, base: Mapping[str, str]) -> dict[str, str]:
    """``base`` with our kernels and torch's held to ``isa``, and to so many threads."""
    switches = {name for isa_ in ISAS.values() for name in isa_}
    env = {k: v for k, v in base.items() if k not in switches}
    env.update(ISAS[isa])
    if threads:
        env.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    return env


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="n3kernels bench", description="Times the operators against plain torch.")
    parser.add_argument("-k", metavar="EXPRESSION", help="only the benchmarks that match, as in pytest")
    parser.add_argument("--full", action="store_true", help="every published size, not only the default ones")
    parser.add_argument("--isa", choices=ISAS, default="native", help="instruction set of ours and of torch's kernels")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing for each benchmark (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of bench.json, .md, .png (default: out)")
    parser.add_argument("--compare", type=Path, metavar="JSON", help="judge the run against this one; exit 1 if slower")
    parser.add_argument("--compare-history", action="store_true", help="the same against the newest recorded figures")
    parser.add_argument("--tolerance", type=float, default=0.1, help="relative slowdown that comparisons allow")
    parser.add_argument("--save", action="store_true", help="also keep the run under benchmarks/results/<device>/")
    parser.add_argument("--report", action="store_true", help="measure nothing: plot what is recorded into OUT/report")
    options = parser.parse_args(argv)
    if options.threads is not None and options.threads < 1:
        parser.error(f"argument --threads: must be at least 1, got {options.threads}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmarks with these command-line options; returns the exit code."""
    options = parse(argv)
    if options.report:
        made = [*history.render(options.out / "report"), *gallery.render(options.out / "report")]
        print(f"{len(made)} files in {options.out / 'report'}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    raw = (options.out / "bench.json").resolve()
    raw.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", str(HERE), "-q", "-p", "no:cacheprovider", "-o", "python_files=bench_*.py",
        f"--benchmark-json={raw}", "--benchmark-quiet", f"--budget={options.budget}",
        *(["--full"] if options.full else []), *(["-k", options.k] if options.k else []),
    ]  # fmt: skip
    code = subprocess.call(command, env=environment(options.isa, options.threads, os.environ))
    if not raw.is_file():
        return code or 1  # nothing was selected, or nothing could be collected
    run = report.slim(report.read(raw))
    write(run, raw)
    print("\n" + report.table(run))
    if options.save:
        keep(raw, run, options.isa)
    before = {}
    if options.compare:
        before[str(options.compare)] = report.read(options.compare)
    if options.compare_history:
        before["the newest recorded figures"] = history.newest(run)
    for name, recorded in before.items():
        comparison = report.compare(recorded, run, options.tolerance)
        print(f"Compared with {name}:\n{comparison}")
        code = code or int(comparison.failed)
    return code


def write(run: dict, path: Path) -> None:
    """``path``, and beside it the same as .md and .png."""
    path.write_text(json.dumps(run, indent=1) + "\n")
    path.with_suffix(".md").write_text(report.table(run))
    try:
        report.plot(run, path.with_suffix(".png"))
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)


def keep(raw: Path, run: dict, isa: str) -> None:
    """Copies a run to benchmarks/results/<device>/<date>[-isa].{json,md,png}."""
    facts = report.machine(run)
    folder = HERE / "results" / report.slug(str(facts.get("device")))
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "" if facts.get("kind") == "cuda" else f"-{isa}"
    for kind in (".json", ".md", ".png"):
        source = raw.with_suffix(kind)
        if source.is_file():
            target = folder / f"{datetime.date.today().isoformat()}{suffix}{kind}"
            shutil.copyfile(source, target)
            print(f"kept {target}")
    recorded = history.add(run, folder.parent)
    print(f"kept {recorded}")


if __name__ == "__main__":
    sys.exit(main())
