"""The emulator finds mistakes: the text of the sm_90 kernels of this family, with one made, fails."""

from __future__ import annotations

import os
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
kernel = t.load("moe_experts.cpp", sources)
for lazy in (0, 1, 2):
    for reverse in (False, True):
        call = t.problem(9, 3, 3, 256, 968)
        t.assert_right(t.run(kernel, call, lazy=lazy, reverse=reverse, sms=1), call)
t.test_gated_activations(kernel, 136, 336, 1, "silu")
t.test_what_lies_behind_infinity_is_zero(kernel, "silu")
"""
GROUPED = """
import test_grouped_cuda_kernel as t
kernel = t.load("moe_grouped.cpp", sources).emulate_grouped_linear
for lazy in (0, 1, 2):
    for reverse in (False, True):
        call = t.problem(50, 190, [0, 3, 130, 0, 20], 328, 264, first=2)
        t.assert_right(t.run(kernel, *call, lazy=lazy, reverse=reverse, sms=1), *call)
"""
LATENT = """
import test_latent_moe_cuda_kernels as t
kernels = t.load("moe_latent.cpp", sources)
for lazy in (0, 1, 2):
    for reverse in (False, True):
        for width, router in ((72, torch.float32), (8192, torch.float32), (8192, torch.bfloat16)):
            args = t.front_problem(3, width, *((70, 24, 130) if width == 72 else (4, 8, 4)), router)
            t.assert_front(t.front(kernels, *args, lazy=lazy, reverse=reverse), args)
        for sizes in ((6, 130, 72, 328), (3, 16, 1032, 8000), (40, 130, 8, 72)):
            args = t.tail_problem(*sizes)
            t.assert_tail(t.tail(kernels, *args, lazy=lazy, reverse=reverse), args)
t.test_float32_router_weights_are_not_narrowed(kernels)
"""
NVFP4 = """
import test_experts_nvfp4_cuda_kernels as t
kernel = t.load("moe_experts_nvfp4.cpp", sources)
for lazy in (0, 1, 2):
    for reverse in (False, True):
        call = t.problem(9, 3, 3, 256, 976, pad=2, shift=1)
        t.assert_right(t.run(kernel, call, lazy=lazy, reverse=reverse, sms=1), call)
t.test_every_code_under_every_scale(kernel)
t.test_a_scale_of_nan_shows_in_its_outputs_alone(kernel)
t.test_what_lies_behind_infinity_is_zero(kernel)
t.test_global_scales(kernel, 1e-36, 1e20, 1e37)
"""
ITEMS, LOADS = "items.cuh", "experts_nvfp4_sm90_loads.cuh"
FILES = {
    "experts": ("experts_sm90_kernel.cuh", EXPERTS),
    "grouped": ("grouped_linear_sm90_kernel.cuh", GROUPED),
    "latent": ("latent_sm90_kernel.cuh", LATENT),
    "nvfp4": ("experts_nvfp4_sm90_kernel.cuh", NVFP4),
}
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
    ("experts", "the gate is the other half"): (None, "gated(gate[i + e], h[i + e], gelu)",
                                                "gated(h[i + e], gate[i + e], gelu)"),
    ("experts", "rows behind the gate's count"): (None, "const bool inside = row + i / 2 % 2 * 8 < rows;",
                                                  "const bool inside = true;"),
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
    ("latent", "none"): (None, "", ""),
    ("latent", "weights without swizzle"): (None, "weights + swizzled(at)", "weights + at"),
    ("latent", "a stage released early"): (None, "last = at.stage;", "last = (at.stage + 1) % Tile::kStages;"),
    ("latent", "a step's stage kept"): (None, "    release(b.empty + at.stage);\n", ""),
    ("latent", "products not waited for"): (None, "  hopper::wait_products<0>();\n  hopper::pin(sum);", ""),
    ("latent", "a step's products not waited for"): (
        None, "      hopper::commit_products();\n      hopper::wait_products<0>();\n      hopper::pin(part);",
        "      hopper::commit_products();\n      hopper::pin(part);"),
    ("latent", "sums over stages in use"): (None, "hopper::sync_threads<128 * Tile::kGroups>(1);", ""),
    ("latent", "parts read early"): (None, "  hopper::sync_cluster();\n  if (busy)", "  if (busy)"),
    ("latent", "parts read when their block is gone"): (
        None, "  hopper::sync_cluster();  // a block's shared memory is there until all have read it\n", ""),
    ("latent", "parts of another tile"): (None, "first = rank - place.part;", "first = 0;"),
    ("latent", "tokens of float32 weights out of step"): (None, "(term.wide ? 32 : 64)", "64"),
    ("latent", "two terms"): (None, "for (int t = 0; t < 3; ++t) {\n          Products",
                              "for (int t = 0; t < 2; ++t) {\n          Products"),
    ("latent", "infinite weights"): (None, "if ((bits & 0x7fffffffu) == 0x7f800000u) rest = 0.f;", ""),
    ("latent", "rows behind the last copied to L2"): (None, " && row < m.rows;", ";"),
    ("latent", "columns behind the last copied to L2"): (None, "left < most ? left : most", "most"),
    ("latent", "a step of the shared expert too few"): ("latent_plan.h", "ceil_div(latent, 64) + ceil_div(inner, 64)",
                                                       "ceil_div(latent + inner, 64)"),
    ("latent", "parts overlap"): ("latent_plan.h", "(part + 1) / s.parts)", "(part + 1) / s.parts + 1)"),
    ("nvfp4", "none"): (None, "", ""),
    ("nvfp4", "scales taken from whole words"): (LOADS, "w[0]) >> 8 * skip[i])", "w[0]))"),
    ("nvfp4", "scales behind a row count"): (
        LOADS, "~uint64_t(0) >> (64 - 8 * unit.blocks)", "~uint64_t(0)"),
    ("nvfp4", "one half's scales for both"): (LOADS, "const int row = i / 2 * 64 + i % 2;", "const int row = i % 2;"),
    ("nvfp4", "scales not waited for"): (None, "hopper::init_barrier(b.landed + i, 2);",
                                         "hopper::init_barrier(b.landed + i, 1);"),
    ("nvfp4", "NaN is 480"): (LOADS, " | ((nan << 4) - (nan >> 5))", ""),
    ("nvfp4", "one scale for two blocks"): (
        None, "scale_pair<device::BF16, kWord / 2>(codes_bf16<kCode + 1>(odd)",
        "scale_pair<device::BF16, 0>(codes_bf16<kCode + 1>(odd)"),
    ("nvfp4", "codes without swizzle"): (
        None, "swizzled_half(row * 64 + lane % 4 * 16)", "row * 64 + lane % 4 * 16"),
    ("nvfp4", "odd rows like even ones"): (LOADS, "parity * pitch + unit.k / 4", "unit.k / 4"),
    ("nvfp4", "inputs in another order"): (
        LOADS, "const uint32_t second[2] = {i ? v[0].w : v[0].z, i ? v[1].w : v[1].z};",
        "const uint32_t second[2] = {i ? v[0].z : v[0].w, i ? v[1].z : v[1].w};"),
    ("nvfp4", "rows behind the inner size"): (None, "const bool inside = row < rows;", "const bool inside = true;"),
    ("nvfp4", "a stage released before it is read"): (
        None, "hopper::wait(b.landed + at.stage, at.parity);\n  const char* stage",
        "hopper::wait(b.landed + at.stage, at.parity);\n  release(b.empty + at.stage);\n  const char* stage"),
    ("nvfp4", "stages' parity stays"): (ITEMS, "parity ^= 1;", ""),
    ("nvfp4", "one place of activations"): (None, "chunk += 2, slot ^= 1", "chunk += 2"),
    ("nvfp4", "no barrier between the products"): (None, "hopper::sync_threads<256>(1);", ""),
    ("nvfp4", "products not waited for"): (None, "  hopper::wait_products<0>();\n  hopper::pin(h);", ""),
    ("nvfp4", "inputs never released"): (None, "release(b.inputs_empty);", "(void)0;"),
    ("nvfp4", "inputs' parity stays"): (LOADS, "warp, index % 2)", "warp, 0)"),
    ("nvfp4", "half of the global scale lost"): (
        "experts_nvfp4_plan.h", "uint32_t(127 - fold) << 23", "uint32_t(127) << 23"),
}  # fmt: skip


def chosen():
    """The text as it is and every fourth mistake of a kernel, for each takes half a minute; in the long profile all."""
    for kernel in FILES:
        of_kernel = [key for key in MISTAKES if key[0] == kernel]
        yield from of_kernel if os.environ.get("HYPOTHESIS_PROFILE") == "long" else of_kernel[::4]


@pytest.mark.parametrize("kernel, name", list(chosen()))
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
        found = ("cuda_emulator:", "AssertionError", "runtime error:")  # the last: of a misaligned access
        assert any(words in result.stderr for words in found), result.stderr
