"""Compiles every CUDA file for every architecture, without a GPU, and reads back what the compiler made of it.

    python scripts/compile_cuda.py [--archs "90a;100a;120a"] [--only nvfp4/linear] [--json facts.json]

CMake does the compiling, with the flags of CMakeLists.txt, into build/cuda; the library is linked there too, into
build/cuda/lib. The table has one row per kernel: registers per thread for each architecture, static shared memory, and
which instructions of interest were found. Exits with 1 if a kernel uses local memory (a spill, or an array that is
indexed at run time), if a kernel named ``tensor_*`` has no tensor core instruction on some architecture, if one named
``*_sm90``, ``*_sm100`` or ``*_sm120`` lacks an instruction it is written for, if a kernel is missing from an
architecture, or if ptxas says that it serialised a kernel's wgmma instructions: each then waits for the one before.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "cuda"
# Tensor cores: HMMA is mma.sync, HGMMA wgmma, OMMA and QMMA the block-scaled kinds of sm_120, UTC*MMA tcgen05; 4X is
# one scale for 16 elements.
TENSOR = ("HMMA", "HGMMA", "OMMA", "OMMA.4X", "QMMA", "UTCHMMA", "UTCOMMA", "UTCOMMA.4X", "UTCQMMA")
MEANT = (*TENSOR, "LDGSTS", "UTMALDG")  # LDGSTS is cp.async, UTMALDG a tile copy by TMA
# In every kernel named *_sm90 and so on. Those of Blackwell multiply e2m1 codes with their block scales.
WRITTEN_FOR = {
    "90": {"HGMMA", "UTMALDG"}, "100": {"UTCOMMA.4X", "UTMALDG"}, "120": {"OMMA.4X", "UTMALDG"},
}  # fmt: skip


# A message of ptxas that no flag turns into an error. Its code (C7510, C7511, C7515, ...) is that of the reason.
SERIALIZED = re.compile(
    r"wgmma\.mma_async instructions are serialized due to (?P<reason>.*) in the function '(?P<name>\w+)'"
)
COMPILING = re.compile(r"Building CUDA object (?P<object>\S+)")  # Ninja's line above what a file's compiler said


def build(archs: str) -> list[str]:
    """Compiles; returns the kernels whose wgmma instructions are serialised, with the reasons."""
    with mock.patch("setuptools.setup"):  # setup.py has the one list of CMake's inputs; only its functions are wanted
        setup = runpy.run_path(str(ROOT / "setup.py"))
    options = {**setup["cmake_options"](BUILD / "lib"), "N3_CUDA": "ON", "N3_CUDA_ARCHS": archs}
    flags = [f"-D{key}={value}" for key, value in options.items()]
    subprocess.check_call(["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *flags], stdout=subprocess.DEVNULL)
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
    command = ["cmake", "--build", BUILD, "-j", jobs]
    said: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return serialized(said, BUILD)


def serialized(said: Iterable[str], folder: Path) -> list[str]:
    """Kernels whose wgmma instructions ptxas serialised, from a build's output, with the reasons.

    Their object files are deleted: ptxas would not say it again of what is not compiled again.
    """
    found, current = {}, None
    for line in said:
        if compiling := COMPILING.search(line):
            current = folder / compiling["object"]
        elif message := SERIALIZED.search(line):
            found[message["name"]] = message["reason"]
            if current:
                current.unlink(missing_ok=True)
    names = demangle(list(found))
    return [f"{names[mangled]}: wgmma instructions are serialised: {reason}" for mangled, reason in found.items()]


def tool(name: str) -> str:
    """A CUDA binary tool: from the toolkit, or from the triton package, which carries its own."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    triton = importlib.util.find_spec("triton")
    if not found and triton:
        found = shutil.which(name, path=str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return found or sys.exit(f"compile_cuda: {name} was not found: install the CUDA toolkit or triton")


def demangle(names: list[str]) -> dict[str, str]:
    """Names without their arguments and namespaces: ``nvfp4_linear::tensor_kernel<BF16, Tile<16, 64, 1, 4, 4> >``."""
    plain = names
    if filt := shutil.which("c++filt") or shutil.which("cu++filt"):
        plain = subprocess.run([filt], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()

    def short(name: str) -> str:
        name = name.removeprefix("void ")
        depth = 0
        for i, c in enumerate(name):
            depth += (c == "<") - (c == ">")
            if c == "(" and depth == 0 and not name[i:].startswith("(anonymous"):
                name = name[:i]
                break
        return re.sub(r"\(anonymous namespace\)::|\b(n3|device)::", "", name).replace("(int)", "")

    return {mangled: short(name) for mangled, name in zip(names, plain, strict=True)}


def facts_of(objects: list[Path]) -> dict[str, dict[str, dict]]:
    """{mangled kernel: {architecture: registers, shared, local, instructions}}."""
    cuobjdump = tool("cuobjdump")
    facts: dict[str, dict[str, dict]] = defaultdict(dict)
    for path in objects:
        arch = name = ""
        usage = subprocess.run([cuobjdump, "-res-usage", path], capture_output=True, text=True, check=True).stdout
        for line in usage.splitlines():
            if found := re.search(r"arch = (\w+)", line):
                arch = found[1]
            elif found := re.search(r"Function (\S+):$", line):
                name = found[1]
            elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
                registers, stack, shared, local = map(int, found.groups())
                facts[name][arch] = {"registers": registers, "shared": shared, "local": max(stack, local)}
        instructions: dict[tuple[str, str], set[str]] = defaultdict(set)
        with subprocess.Popen([cuobjdump, "-sass", path], stdout=subprocess.PIPE, text=True) as dump:
            for line in dump.stdout:
                if found := re.search(r"arch = (\w+)", line):
                    arch = found[1]
                elif found := re.search(r"Function : (\S+)", line):
                    name = found[1]
                elif found := re.search(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]+)((?:\.\w+)*)", line):
                    if found[1] in MEANT:
                        instructions[name, arch].add(found[1] + (".4X" if ".4X" in found[2] else ""))
        for kernel, by_arch in facts.items():
            for a in by_arch:
                if (kernel, a) in instructions or "instructions" not in by_arch[a]:
                    by_arch[a]["instructions"] = sorted(instructions[kernel, a])
    return facts


def problems_of(name: str, by_arch: dict[str, dict], archs: list[str]) -> list[str]:
    problems = []
    for arch in archs:
        fact = by_arch.get(f"sm_{arch}")
        if fact is None:
            if not re.search(r"_sm\d+", name):
                problems.append(f"missing for sm_{arch}")
            continue
        if fact["local"]:
            problems.append(f"{fact['local']} bytes of local memory on sm_{arch}")
        if "::tensor_" in name and not set(fact["instructions"]) & set(TENSOR):
            problems.append(f"no tensor core instruction on sm_{arch}")
        for only in re.findall(r"_sm(90|100|120)\b", name):
            if lacking := WRITTEN_FOR[only] - set(fact["instructions"]):
                problems.append(f"no {' and no '.join(sorted(lacking))} on sm_{arch}")
    return problems


def report(rows: dict[str, dict[str, dict]], archs: list[str]) -> int:
    width = max(map(len, rows), default=0)
    print(f"{'kernel':<{width}}  " + "  ".join(f"{'sm_' + a:>9}" for a in archs) + "   smem  instructions")
    failed = 0
    for name, by_arch in sorted(rows.items()):
        registers = "  ".join(f"{by_arch.get('sm_' + a, {}).get('registers', '-'):>9}" for a in archs)
        shared = max(f["shared"] for f in by_arch.values())
        found = sorted(set().union(*(f["instructions"] for f in by_arch.values())))
        problems = problems_of(name, by_arch, archs)
        failed += bool(problems)
        print(f"{name:<{width}}  {registers}  {shared:>5}  {' '.join(found)}")
        for problem in problems:
            print(f"{'':<{width}}  FAILED: {problem}")
    print(f"{len(rows)} kernels, registers per thread and bytes of shared memory; {failed} failed")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", default="90a;100a;120a")
    parser.add_argument("--only", default="", help="show only object files whose path contains this")
    parser.add_argument("--json", type=Path, help="write the facts to this file too")
    args = parser.parse_args()
    slow = build(args.archs)
    archs = args.archs.split(";")
    objects = [p for p in sorted(BUILD.glob("CMakeFiles/n3_cuda.dir/csrc/*/*.cu.o")) if args.only in str(p)]
    if not objects:
        print("no CUDA files")
        return 0
    facts = facts_of(objects)
    names = demangle(list(facts))
    rows = {names[mangled]: by_arch for mangled, by_arch in facts.items()}
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n")
    failed = report(rows, archs)
    for problem in slow:
        print(f"FAILED: {problem}")
    return 1 if failed or slow else 0


if __name__ == "__main__":
    sys.exit(main())
