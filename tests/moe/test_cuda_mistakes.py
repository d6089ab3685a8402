"""The emulator finds mistakes: the text of the sm_90 kernels of this family, with one made, fails."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++") or not (ROOT / "csrc").is_dir(), reason="needs g++ and the sources"),
]

EXPERTS = """
import test_experts_cuda_kernels as t
kernel = t.build(folder, sources)
for lazy in (0, 1, 2):
    for reverse in (False, True):
        call = t.problem(9, 3, 3, 256, 968)
        t.assert_right(t.run(kernel, call, lazy=lazy, reverse=reverse, sms=1), call)
"""
GROUPED = """
import test_grouped_cuda_kernel as t
kernel = t.build(folder, sources)
for lazy in (0, 1, 2):
    for reverse in (False, True):
        call = t.problem(50, 190, [0, 3, 130, 0, 20], 328, 264, first=2)
        t.assert_right(t.run(kernel, *call, lazy=lazy, reverse=reverse, sms=1), *call)
"""
ITEMS = "items.cuh"
FILES = {"experts": ("experts_sm90_kernel.cuh", EXPERTS), "grouped": ("grouped_linear_sm90_kernel.cuh", GROUPED)}
MISTAKES = {
    ("experts", "none"): (None, "", ""),
    ("experts", "activations without swizzle"): (None, "const int at = swizzled(", "const int at = ("),
    ("experts", "inputs without swizzle"): (None, "const int to = swizzled(", "const int to = ("),
    ("experts", "stages' parity stays"): (ITEMS, "parity ^= 1;", ""),
    ("experts", "inputs' parity stays"): (
        None,
        "parity ^= 1) {\n    const Item item = item_at(p.work, before, p.offsets, i, Tile::kTokens);\n    hopper::wait",
        "(void)0) {\n    const Item item = item_at(p.work, before, p.offsets, i, Tile::kTokens);\n    hopper::wait",
    ),
    ("experts", "one place of activations"): (None, "chunk += 2, slot ^= 1", "chunk += 2"),
    ("experts", "no barrier between the products"): (None, "hopper::sync_threads<256>(1);", ""),
    ("experts", "the last chunk taken for two"): (
        None, "const bool both = chunk + 1 < range.end", "const bool both = true"),
    ("experts", "a stage released early"): (
        None, "if (m + h) release(b.empty + last);\n      last = at.stage;",
        "if (m + h) release(b.empty + last);\n      last = (at.stage + 1) % S::kStages;"),
    ("experts", "products not waited for"): (None, "  hopper::wait_products<0>();\n  hopper::pin(h);", ""),
    ("experts", "inputs never released"): (None, "release(b.inputs_empty);", "(void)0;"),
    ("experts", "one row for all ranges"): (None, "(p.work.split ? range : 0)", "0"),
    ("grouped", "none"): (None, "", ""),
    ("grouped", "rows without swizzle"): (
        None, "to + items::swizzled(row * 128 + piece * 16)", "to + row * 128 + piece * 16"),
    ("grouped", "copies not waited for"): (None, "device::wait_copies<kLag>();\n", ""),
    ("grouped", "sources overwritten"): (
        None, "    hopper::sync_threads<96>(1);  // nobody needs the sources of the tile before\n", ""),
    ("grouped", "sources read early"): (
        None, "    }\n    hopper::sync_threads<96>(1);\n", "    }\n"),
    ("grouped", "a stage released early"): (None, "last = at.stage;", "last = (at.stage + 1) % kStages;"),
    ("grouped", "columns behind k are read"): (None, "const bool valid = inside && source >= 0;",
                                              "const bool valid = source >= 0;"),
}  # fmt: skip


@pytest.mark.parametrize("kernel, name", MISTAKES)
def test_finds_a_mistake(tmp_path, kernel, name):
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    own, program = FILES[kernel]
    file, right, wrong = MISTAKES[kernel, name]
    if right:
        path = sources / "moe" / (file or own)
        text = path.read_text()
        assert text.count(right) == 1, "the kernel's text has changed"
        path.write_text(text.replace(right, wrong))
    start = (
        f"import sys, pathlib, torch\nsys.path[:0] = [{str(Path(__file__).parent)!r}, {str(ROOT / 'tests')!r}]\n"
        f"torch.manual_seed(0)\nfolder, sources = pathlib.Path({str(tmp_path)!r}), pathlib.Path({str(sources)!r})\n"
    )
    # A deadlock ends the process.
    result = subprocess.run([sys.executable, "-c", start + program], capture_output=True, text=True, cwd=ROOT)
    if name == "none":
        assert result.returncode == 0, result.stderr
    else:
        assert "cuda_emulator:" in result.stderr or "AssertionError" in result.stderr, result.stderr
