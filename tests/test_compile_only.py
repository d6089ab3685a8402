"""Every Triton kernel with every row of its configuration table compiles for every architecture, without a GPU.

Run as a program, this file is the compiler: ``python tests/test_compile_only.py 90`` prints one JSON line per case. It
must be a process of its own, as conftest switches this one to the interpreter.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile

import pytest

# Shared memory one block may have, in bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_MEMORY = {90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}

# In PTX, what is not one rounding to nearest: `/`, sqrt and exp of Triton in float32 (div_rn and sqrt_rn are), fused
# multiply-adds, and what names no rounding, which the assembler may fuse.
INEXACT = re.compile(r"\b(?:(?:div\.full|\w+\.approx|fma\.rn|add|sub|mul)(?:\.ftz)?|\w+\.rn\.ftz)\.f32\b")


# Of a kernel in a cubin: registers and, in bytes, local memory of a thread.
USAGE = re.compile(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)")
# What may lie in local memory, in bytes, although registers are not out: ptxas gives up some to have one block more on
# a multiprocessor.
TRADED = 32
# What spills, in bytes, by architecture and the beginning of a case's name: no more, and nothing else. Half or twice
# the warps do not help the scan's.
SPILLS = {
    (90, "mamba.ssd_scan_bwd:scan-bwd-head_grads-strided"): 8,
    (90, "mamba.ssd_scan_bwd:scan-bwd-group_grads-strided-fp32"): 16,
    (100, "mamba.ssd_scan_bwd:scan-bwd-head_grads-strided"): 16,
    (100, "nvfp4.gemm:grouped-"): 32,  # with fewer warps the dense product spills
    (120, "mamba.ssd_scan_bwd:scan-bwd-head_grads-"): 64,
    (120, "mamba.ssd_scan_bwd:scan-bwd-group_grads-"): 56,
    (120, "nvfp4.linear:linear-fp16-"): 56,  # with bfloat16 they fit; more warps would help, at the cost of bfloat16
}


def all_cases(arch: int):
    """(module, case) of every module of n3kernels.triton_ops that has compile_cases."""
    import n3kernels.triton_ops as root

    for found in pkgutil.walk_packages(root.__path__, root.__name__ + "."):
        module = importlib.import_module(found.name)
        for case in getattr(module, "compile_cases", lambda arch: ())(arch):
            yield found.name.removeprefix(root.__name__ + "."), case


def compile_case(case, arch: int) -> dict[str, object]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    missing = [n for n in names if n not in case.types and n not in case.constexprs]
    assert not missing, f"{case.name}: no type for {missing}"
    signature, constants, attrs = {}, {(names.index(name),): value for name, value in case.constexprs.items()}, {}
    multiple_of_16 = [["tt.divisibility", 16]]
    for i, name in enumerate(names):
        type = case.types.get(name, "constexpr")
        if isinstance(type, tuple):
            constants |= {(i, j): t for j, t in enumerate(type) if not isinstance(t, str)}
            attrs |= {(i, j): multiple_of_16 for j, t in enumerate(type) if str(t).endswith(":16")}
            signature[name] = tuple(t.partition(":")[0] if isinstance(t, str) else "constexpr" for t in type)
        else:
            signature[name], _, multiple = type.partition(":")
            if multiple or name in case.aligned or (not case.aligned and type.startswith("*")):
                attrs[(i,)] = multiple_of_16
    source = ASTSource(case.kernel, signature, constants, attrs)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(case.options))
    inexact = sorted(set(INEXACT.findall(kernel.asm["ptx"]))) if case.exact else []
    registers, local = usage_of(kernel.asm["cubin"])
    left = min(255, 65536 // (32 * kernel.metadata.num_warps)) - registers
    return {"shared": kernel.metadata.shared, "local": local, "registers_left": left, "inexact": inexact}


def usage_of(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes in local memory of a thread, read from a cubin by the tool that comes with Triton."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (max(map(int, numbers)) for numbers in zip(*USAGE.findall(said), strict=True))
    return registers, stack + local


def main(arch: int) -> None:
    for module, case in all_cases(arch):
        try:
            result = compile_case(case, arch)
        except Exception as error:  # one bad case must not hide the others
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"case": f"{module}:{case.name}", **result}), flush=True)


# ---------------------------------------------------------------- the tests

pytest.importorskip("triton")


@pytest.fixture(scope="session")
def compiled():
    """{architecture: {case: result}}, the architectures side by side."""
    options = {"env": {**os.environ, "TRITON_INTERPRET": "0"}, "stdout": subprocess.PIPE, "text": True}
    runs = {arch: subprocess.Popen([sys.executable, __file__, str(arch)], **options) for arch in SHARED_MEMORY}
    results = {}
    for arch, run in runs.items():
        lines = [json.loads(line) for line in run.communicate()[0].splitlines()]
        assert run.returncode == 0, f"the compiler process for {arch} failed"
        results[arch] = {line.pop("case"): line for line in lines}
    return results


@pytest.mark.parametrize("arch, name", [(a, f"{m}:{c.name}") for a in SHARED_MEMORY for m, c in all_cases(a)])
def test_compiles(compiled, arch, name):
    result = compiled[arch][name]
    assert "error" not in result, result["error"]
    assert not result["inexact"]
    known = max((bytes for (a, case), bytes in SPILLS.items() if a == arch and name.startswith(case)), default=0)
    allowed = TRADED if result["registers_left"] >= 8 else known
    assert result["local"] <= allowed, f"{result['local']} bytes of a thread do not fit into registers"
    assert result["shared"] <= SHARED_MEMORY[arch], f"{result['shared']} bytes of shared memory"


@pytest.mark.parametrize("arch, case", SPILLS)
def test_what_may_spill_is_there(arch, case):
    assert any(f"{module}:{c.name}".startswith(case) for module, c in all_cases(arch))


def test_every_kernel_has_a_case():
    """A kernel that is launched must be compiled here: jitted functions whose names end in _kernel are launched."""
    import n3kernels.triton_ops as root

    covered = {id(case.kernel) for arch in SHARED_MEMORY for _, case in all_cases(arch)}
    for found in pkgutil.walk_packages(root.__path__, root.__name__ + "."):
        module = importlib.import_module(found.name)
        for name, value in vars(module).items():
            if name.endswith("_kernel") and hasattr(value, "arg_names") and value.__module__ == found.name:
                assert id(value) in covered, f"{found.name}.{name} has no case"


if __name__ == "__main__":
    main(int(sys.argv[1]))
