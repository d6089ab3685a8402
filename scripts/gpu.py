"""Everything that needs a GPU, in one command: tests with --prove, compute-sanitizer, benchmarks, one results file.

    python scripts/gpu.py [--steps build,tests,sanitizer,bench] [--limit 540] [--families nvfp4,mamba] [--dry-run]

A library that was built elsewhere is used where it has code for this GPU, so nothing has to be compiled or installed
on a machine that is borrowed for minutes; `make gpu VENV=none PYTHON=python3` needs no pip. A step that fails or runs
out of its time is recorded as such and the next one begins. Results go to benchmarks/results/<device>/<date>.json and
.md, and to $OUT where that is set; further commands on the same commit and day add to the same file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import report  # noqa: E402

STEPS = ("build", "tests", "sanitizer", "bench")
FAMILIES = ("nvfp4", "mamba", "moe", "mtp", "nemotron")
SCRATCH = Path("build") / "gpu"
SECONDS = {"build": 1500, "tests": 900, "sanitizer": 300, "bench": 300}  # at most, for one step
NO_TESTS = 5  # exit code of pytest
LEAST = 10  # seconds: with less left, a step is not begun
# Every kernel on odd sizes and strides, small; not the emulator's tests, nor those of gigabytes.
SANITIZED = (
    "cuda and (agree or stride or slots or chunks or tree or coupled or commit or flush)"
    " and not cuda_kernel and not far"
)


@dataclass(frozen=True)
class Gpu:
    name: str
    arch: str  # sm_90
    driver: str = ""


@dataclass(frozen=True)
class Step:
    name: str
    command: tuple[str, ...]
    seconds: float
    missing: str = ""  # why it cannot run here


@dataclass(frozen=True)
class Outcome:
    name: str
    status: str  # passed, empty (no test of the family is meant for it), failed, out of time, not run
    seconds: float = 0.0
    summary: str = ""  # the last line that says something


# ---------------------------------------------------------------- what to run


def needs_build(facts: dict | None, arch: str) -> bool:
    """Whether the library is missing (no _build.json) or has no code for ``arch``."""
    archs = (facts or {}).get("archs", "").split()
    return arch not in {"sm_" + a.rstrip("af") for a in archs}


def plan(
    options: argparse.Namespace, gpu: Gpu, facts: dict | None, benches: Sequence[str], sanitizer: str | None
) -> list[Step]:
    """The steps of these options; ``benches`` are the stems of benchmark files, ``sanitizer`` the tool's path."""
    python, steps = options.python, []

    def add(kind: str, name: str, command: Sequence[str], missing: str = "") -> None:
        steps.append(Step(name, tuple(command), options.seconds.get(kind, SECONDS[kind]), missing))

    if "build" in options.steps and needs_build(facts, gpu.arch):
        add("build", "build", [python, "setup.py", "-q", "build_ext", "--inplace"])
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow"]
    if "tests" in options.steps:
        for family in options.families:
            command = [*pytest, "-v", f"tests/{family}", "--prove"]  # -v: the last line names a test that hangs
            add("tests", f"tests: {family}", [*command, *(["-k", options.only] if options.only else [])])
    if "sanitizer" in options.steps:
        missing = "" if sanitizer else "compute-sanitizer was not found"
        for tool in ("memcheck", "racecheck"):
            for family in options.families:
                # Without torch's cache of blocks, an overrun does not end in a neighbour.
                check = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer or "compute-sanitizer", "--tool", tool]
                check += ["--error-exitcode", "99", "--target-processes", "all"]
                command = [*check, *pytest, f"tests/{family}", "-k", options.select]
                add("sanitizer", f"{tool}: {family}", command, missing)
    if "bench" in options.steps:
        for stem in benches:
            out = SCRATCH / stem
            bench = [python, "-m", "n3kernels.benchmarks.run", "-k", stem, "--out", str(out)]
            add("bench", f"bench: {stem}", [*bench, *(["--full"] if options.full else [])])
    return steps


# ---------------------------------------------------------------- running it


def closing_line(output: str) -> str:
    """What a step's output ends with: pytest's counts if they are there, else its last line."""
    lines = [line.strip(" =\r") for line in output.splitlines() if line.strip(" =\r")]
    counts = [line for line in lines if re.match(r"(\d+ (passed|failed|error|skipped|deselected)|no tests ran)", line)]
    errors = [line for line in lines if "ERROR SUMMARY" in line]
    return "; ".join([*(counts or lines)[-1:], *errors[-1:]])[:300]


def run(step: Step, left: float, execute: Callable[..., tuple[int | None, str]]) -> Outcome:
    """Runs one step in what is left of the whole time; ``execute`` returns no exit code where the time ran out."""
    seconds = min(step.seconds, left)
    if step.missing:
        return Outcome(step.name, "not run", 0.0, step.missing)
    if seconds < LEAST:
        return Outcome(step.name, "not run", 0.0, "no time was left")
    start = time.monotonic()
    code, output = execute(step.command, seconds)
    took = round(time.monotonic() - start, 1)
    if code is None:
        return Outcome(step.name, "out of time", took, f"stopped after {seconds:.0f} s; {closing_line(output)}"[:300])
    status = {0: "passed", NO_TESTS: "empty"}.get(code, "failed")
    return Outcome(step.name, status, took, closing_line(output))


def execute(command: Sequence[str], seconds: float) -> tuple[int | None, str]:
    """Runs a command in a process group of its own; its output is shown as it comes. No exit code: it was killed."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    env.update(PYTHONUNBUFFERED="1", N3_CUDA="ON")
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, errors="replace", start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    lines: list[str] = []

    def pump() -> None:
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)

    pumping = threading.Thread(target=pump, daemon=True)
    pumping.start()
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # pytest, killed, writes no proof
        process.wait()
        code = None
    pumping.join(10)  # a daemon that escaped the group may hold the pipe open
    return code, "".join(lines)


# ---------------------------------------------------------------- the results file


def results(gpu: Gpu, commit: str, date: str, outcomes: Sequence[Outcome], runs: Sequence[dict]) -> dict:
    """One benchmark run out of several, as `report` reads it, with the steps beside it."""
    merged = {"machine_info": {}, "commit_info": {"id": commit}, "datetime": date, "benchmarks": []}
    for run_ in runs:
        merged["machine_info"] = run_["machine_info"]
        merged["benchmarks"] += run_["benchmarks"]
    return {**merged, "gpu": asdict(gpu), "steps": [asdict(outcome) for outcome in outcomes]}


def merge(old: dict | None, new: dict) -> dict:
    """``new`` with what ``old``, of the same commit, has besides: a borrowed machine is used in several commands."""
    if not old or old.get("commit_info", {}).get("id") != new["commit_info"]["id"]:
        return new
    ran = {step["name"] for step in new["steps"] if step["status"] != "not run"}
    known = {step["name"] for step in old.get("steps", [])}
    steps = [s for s in old.get("steps", []) if s["name"] not in ran]
    steps += [s for s in new["steps"] if s["name"] in ran or s["name"] not in known]
    timed = {b["group"] for b in new["benchmarks"]}
    kept = [b for b in old["benchmarks"] if b["group"] not in timed]
    info = new["machine_info"] or old["machine_info"]
    return {**new, "machine_info": info, "steps": steps, "benchmarks": kept + new["benchmarks"]}


def summary(result: dict) -> str:
    """The results in Markdown: a line for every step, then the benchmarks."""
    gpu, commit = result["gpu"], result["commit_info"]["id"]
    lines = [f"# {gpu['name']} ({gpu['arch']}), {result['datetime']}, commit {commit[:12]}", ""]
    lines += ["| step | outcome | seconds | |", "|---|---|---:|---|"]
    for step in result["steps"]:
        closing = step["summary"].replace("|", "\\|")
        lines.append(f"| {step['name']} | {step['status']} | {step['seconds']:.0f} | {closing} |")
    if result["benchmarks"]:
        lines += ["", report.table(result)]
    return "\n".join(lines) + "\n"


def save(result: dict) -> dict:
    """Writes the results, merged with the day's, into the tree and to $OUT; returns what was written."""
    folder = ROOT / "benchmarks" / "results" / report.slug(result["gpu"]["name"])
    path = folder / f"{result['datetime']}.json"
    folder.mkdir(parents=True, exist_ok=True)
    result = merge(report.read(path) if path.is_file() else None, result)
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(summary(result))
    if os.environ.get("OUT"):
        for source in (path, path.with_suffix(".md"), ROOT / "n3kernels" / "proven.json"):
            if source.is_file():
                shutil.copy(source, os.environ["OUT"])
    return result


# ---------------------------------------------------------------- facts of this machine


def this_gpu() -> Gpu | None:
    """The first visible GPU; asked of the driver, so that no CUDA context is made here."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
    name, capability, driver = (field.strip() for field in line.split(","))
    return Gpu(name, "sm_" + capability.replace(".", ""), driver)


def this_build() -> dict | None:
    facts = ROOT / "n3kernels" / "_build.json"
    library = ROOT / "n3kernels" / "_C.so"
    return json.loads(facts.read_text()) if facts.is_file() and library.is_file() else None


def this_commit() -> str:
    """Of the tree; of the library, where the tree came without its repository."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip() or (this_build() or {}).get("revision", "unknown")


def this_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def listed(text: str) -> list[str]:
        return [part for part in text.split(",") if part]

    def budgets(text: str) -> dict[str, float]:
        return {name: float(seconds) for name, seconds in (part.split("=") for part in listed(text))}

    parser.add_argument("--steps", type=listed, default=list(STEPS), help=f"of {','.join(STEPS)} (default: all)")
    parser.add_argument("--families", type=listed, default=list(FAMILIES), help=f"of {','.join(FAMILIES)}")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds for everything (default: no limit)")
    parser.add_argument("--seconds", type=budgets, default={}, help="for one step of a kind, e.g. tests=300,bench=60")
    parser.add_argument("--select", default=SANITIZED, help=f"tests under the sanitizer, as -k (default: {SANITIZED})")
    parser.add_argument("--only", default="", help='tests of the tests step, as -k, e.g. "cuda and not cuda_kernel"')
    parser.add_argument("--full", action="store_true", help="benchmark every published size")
    parser.add_argument("--python", default=sys.executable, help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="print the steps and run none")
    options = parser.parse_args(argv)
    for name, chosen, known in (("steps", options.steps, STEPS), ("families", options.families, FAMILIES)):
        if unknown := set(chosen) - set(known):
            parser.error(f"--{name}: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    options = parse(argv)
    gpu = this_gpu()
    if gpu is None and not options.dry_run:
        print("gpu.py: no GPU is visible (nvidia-smi); --dry-run shows what would run", file=sys.stderr)
        return 2
    options.families = [f for f in options.families if (ROOT / "tests" / f).is_dir()]
    benches = sorted(path.stem for path in (ROOT / "benchmarks").glob("*/bench_*.py"))
    shown = gpu or Gpu("no GPU", "sm_90")
    steps = plan(options, shown, this_build(), benches, this_sanitizer())
    if options.dry_run:
        print(f"On {shown.name} ({shown.arch}), at most {options.limit:.0f} s:")
        for step in steps:
            print(f"  {step.name:<22}{step.seconds:>6.0f} s  {step.missing or ' '.join(step.command)}")
        return 0
    shutil.rmtree(ROOT / SCRATCH, ignore_errors=True)
    (ROOT / SCRATCH).mkdir(parents=True)
    outcomes: list[Outcome] = []
    commit, today, result = this_commit(), datetime.date.today().isoformat(), None
    for step in steps:
        print(f"\n==== {step.name}: {' '.join(step.command)}", flush=True)
        outcomes.append(run(step, options.limit - (time.monotonic() - start), execute))
        runs = [report.read(path) for path in sorted((ROOT / SCRATCH).glob("*/bench.json"))]
        result = save(results(gpu, commit, today, outcomes, runs))  # after each step: this process may be ended too
    if result:
        print("\n" + summary(result))
    good = sum(outcome.status in ("passed", "empty") for outcome in outcomes)
    print(f"{good} of {len(outcomes)} steps passed in {time.monotonic() - start:.0f} s")
    return int(good < len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
