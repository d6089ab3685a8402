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
import emulated_experts as e, test_experts_cuda_kernels as t
kernel = t.load(e.SOURCE, sources)
for lazy in (0, 1, 2):
    for reverse in (False, True):
        call = e.problem("dense", 9, 3, 3, 256, 968)
        e.assert_right(e.run(kernel, call, lazy=lazy, reverse=reverse, sms=1), call)
t.test_gated_activations(kernel, "dense", 136, 336, 1, "silu")
t.test_what_lies_behind_infinity_is_zero(kernel, "dense", "silu")
for merged in (False, True):
    t.test_whoever_comes_last(kernel, "dense", merged)
t.test_a_row_does_not_depend_on_the_batch(kernel, "dense", False)
t.test_a_batch_in_two_launches(kernel, "dense")
"""
GROUPED = """
import test_grouped_cuda_kernel as t
kernel = t.load("moe_grouped.cpp", sources).emulate_grouped_linear
for lazy in (0, 1, 2):
    for reverse in (False, True):
        call = t.problem(50, 190, [0, 3, 130, 0, 20], 328, 264, first=2)
        t.assert_right(t.run(kernel, *call, lazy=lazy, reverse=reverse, sms=1), *call)
t.test_gated_activations(kernel, 80, 288, "silu")
"""
GROUPED_NVFP4 = """
import test_grouped_nvfp4_cuda_kernels as t
kernels = t.load("moe_grouped_nvfp4.cpp", sources)
for lazy in (0, 1, 2):
    for reverse in (False, True):
        call = t.problem(50, 190, [0, 3, 130, 0, 20], 976, 264, first=2, pad=2, shift=1)
        t.assert_right(t.run(kernels, *call, lazy=lazy, reverse=reverse, sms=1), *call)
t.test_gated_activations(kernels, 80, 288, 128, "silu")
t.test_rows_that_are_not_there(kernels)
for dtype in (torch.float16, torch.bfloat16):
    t.test_every_code_under_every_scale(kernels, dtype)
for activation in ("relu2", "silu"):
    t.test_experts(kernels, 144, 80, activation)
    t.test_what_lies_behind_infinity_is_zero(kernels, activation)
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
import emulated_experts as e, test_experts_cuda_kernels as f, test_experts_nvfp4_cuda_kernels as t
kernel = t.load(e.SOURCE, sources)
for lazy in (0, 1, 2):
    for reverse in (False, True):
        call = e.problem("nvfp4", 9, 3, 3, 256, 976, pad=2, shift=1)
        e.assert_right(e.run(kernel, call, lazy=lazy, reverse=reverse, sms=1), call)
t.test_every_code_under_every_scale(kernel)
t.test_a_scale_of_nan_shows_in_its_outputs_alone(kernel)
f.test_what_lies_behind_infinity_is_zero(kernel, "nvfp4", "silu")
f.test_gated_activations(kernel, "nvfp4", 136, 336, 1, "silu")
t.test_global_scales(kernel, 1e-36, 1e20, 1e37)
"""
ITEMS, LOADS, FRAME = "items.cuh", "experts_nvfp4_sm90_loads.cuh", "grouped_frame.cuh"
DENSE, PLAN, HOPPER = "experts_sm90_kernel.cuh", "experts_plan.h", "../common/hopper.cuh"
FRAME90, SLOTS, SUM = "experts_frame_sm90.cuh", "experts_slots_sm90.cuh", "experts_sum_sm90.cuh"
FILES = {
    "experts": ("experts_frame_sm90.cuh", EXPERTS),
    "grouped": ("grouped_linear_sm90_kernel.cuh", GROUPED),
    "grouped_nvfp4": ("grouped_nvfp4_sm90_kernel.cuh", GROUPED_NVFP4),
    "latent": ("latent_sm90_kernel.cuh", LATENT),
    "nvfp4": ("experts_nvfp4_sm90_kernel.cuh", NVFP4),
}
MISTAKES = {
    ("experts", "none"): (None, "", ""),
    ("experts", "activations without swizzle"): (None, "+ swizzled((8 * j", "+ ((8 * j"),
    ("experts", "inputs without swizzle"): (DENSE, "const int to = swizzled(", "const int to = ("),
    ("experts", "stages' parity stays"): (ITEMS, "parity ^= 1;", ""),
    ("experts", "inputs' parity stays"): (None, "hopper::wait(b.inputs_landed, n % 2);",
                                          "hopper::wait(b.inputs_landed, 0);"),
    ("experts", "one place of activations"): (None, "chunk += 2, slot ^= 1", "chunk += 2"),
    ("experts", "no barrier between the products"): (
        None, "hopper::sync_threads<kComputing>(1);  // and nobody reads the other", "// and nobody reads the other"),
    ("experts", "the last chunk taken for two"): (None, "const int halves = chunk + 1 < end() ? 2 : 1;",
                                                  "const int halves = 2;"),
    ("experts", "a stage released early"): (
        DENSE, "if (m + h) release(b.empty + last);\n        last = at.stage;",
        "if (m + h) release(b.empty + last);\n        last = (at.stage + 1) % Ring::kStages;"),
    ("experts", "products not waited for"): (DENSE, "    hopper::wait_products<0>();\n    hopper::pin(h);", ""),
    ("experts", "inputs never released"): (None, "release(b.inputs_empty);", "(void)0;"),
    ("experts", "one row for all ranges"): (None, "(p.work.split ? range : 0)", "0"),
    ("experts", "the gate is the other half"): (None, "const int32_t half = Format::kGated && u >= deep;",
                                                "const int32_t half = Format::kGated && u < deep;"),
    ("experts", "rows behind the gate's count"): (None, "const bool inside = row < rows;", "const bool inside = true;"),
    ("experts", "counters stay"): (HOPPER, "before >= arrivals - 1 ? 0 : before + 1;", "before + 1;"),
    ("experts", "the first to come adds up"): (HOPPER, "return before == arrivals - 1;", "return before == 0;"),
    ("experts", "slots are added from where their block begins"): (
        SUM, "const int64_t slot = first + from + u;",
        "const int64_t slot = first + (from + u + int(blockIdx.x)) % p.top_k;"),
    ("experts", "ranges are added from where their block begins"): (
        SUM, "const float4 v = row[int64_t(r) * pieces];",
        "const float4 v = row[int64_t(1 + (r + blockIdx.x) % (parts - 1)) * pieces];"),
    ("experts", "blocks list slots in different orders"): (
        SLOTS, "const int32_t at = rank + __popc(all & ((1u << lane) - 1));",
        "const int32_t at = rank + (blockIdx.x % 2 ? __popc(all >> lane >> 1) : __popc(all & ((1u << lane) - 1)));"),
    ("experts", "ranges not waited for"): (SUM, "    if (!meeting.last) return;\n", ""),
    ("experts", "rows added before they are stored"): (
        SUM, "  hopper::sync_threads<kComputing>(1);  // all rows are stored", "  // all rows are stored"),
    ("experts", "slots added before their ranges"): (
        SUM, "    add_ranges(p, list);\n    hopper::sync_threads<kComputing>(1);", "    add_ranges(p, list);"),
    ("experts", "the meeting where activations are"): (None, "memory + S::kMeetingAt", "memory + S::kHiddenAt"),
    ("experts", "one list"): (PLAN, "kLists = 3;", "kLists = 1;"),
    ("experts", "a list read before it is made"): (None, "  hopper::sync_threads<32 * kLoaders>(2);\n", ""),
    ("experts", "partners of padding"): (SLOTS, "*p.valid_tokens - p.first_token", "*p.valid_tokens"),
    ("experts", "tokens without slots are left"): (None, "      clear_rows(p, tiles.slots, warp - 1);\n", ""),
    ("grouped", "none"): (None, "", ""),
    ("grouped", "rows without swizzle"): (
        FRAME, "items::swizzled(row * 128 + piece * 16)", "row * 128 + piece * 16"),
    ("grouped", "copies not waited for"): (FRAME, "device::wait_copies<kLag>();\n", ""),
    ("grouped", "sources overwritten"): (
        FRAME, "    hopper::sync_threads<96>(1);  // nobody needs the sources of the tile before\n", ""),
    ("grouped", "sources read early"): (
        FRAME, "    }\n    hopper::sync_threads<96>(1);\n", "    }\n"),
    ("grouped", "a stage released early"): (None, "last = at.stage;", "last = (at.stage + 1) % Dense::kStages;"),
    ("grouped", "columns behind k are read"): (FRAME, "const bool valid = column < p.k && source >= 0;",
                                              "const bool valid = source >= 0;"),
    ("grouped", "gates beside what they do not gate"): (None, "n / 128 * p.outputs", "n / 128 * 128"),
    ("grouped_nvfp4", "none"): (None, "", ""),
    ("grouped_nvfp4", "a stage released early"): (
        None, "last = at.stage;", "last = (at.stage + 1) % Packed<kRows>::kStages;"),
    ("grouped_nvfp4", "products not waited for"): (
        None, "  hopper::wait_products<0>();\n  hopper::pin(d[0]);", "  hopper::pin(d[0]);"),
    ("grouped_nvfp4", "released before its products have ended"): (
        None, "    if constexpr (kStep == 0) begun();\n", ""),
    ("grouped_nvfp4", "odd rows like even ones"): (None, "box % 2 * p.pitch + k / 4", "k / 4"),
    ("grouped_nvfp4", "gates beside what they do not gate"): (
        None, "piece * p.outputs + item.first_range", "piece * kPiece + item.first_range"),
    ("grouped_nvfp4", "scales of another block"): (None, "first + threadIdx.x % 4 * 2;", "first + threadIdx.x % 4;"),
    ("grouped_nvfp4", "scales behind a row count"): (None, "block + 1 < p.blocks ?", "block < p.blocks ?"),
    ("grouped_nvfp4", "the second product's codes for both"): (
        None, "own.codes[half] + h * own.next_codes", "own.codes[half] + own.next_codes"),
    ("grouped_nvfp4", "a group's scale for another"): (
        None, "p.scales.data + item.expert * p.scales.expert_stride", "p.scales.data"),
    ("grouped_nvfp4", "no zeros behind the activations"): (None, "inside[1] ? result(1) : 0.f", "result(1)"),
    ("grouped_nvfp4", "steps out of step"): (None, "        items::release(f.barriers.empty + at.stage);\n", ""),
    ("grouped_nvfp4", "NaN weights where no row is"): (None, "empty ? 0 : device::pack", "device::pack"),
    ("grouped_nvfp4", "activations in another order"): (
        "grouped_nvfp4_plan.h", "32 * warp + 16 * part + 2 * q", "32 * warp + 2 * part + 4 * q"),
    ("grouped_nvfp4", "rows of x in another order"): (
        "order_kernel.cuh", "high = s ? v[t].w : v[t].z", "high = s ? v[t].z : v[t].w"),
    ("grouped_nvfp4", "float16's NaN is 480"): ("nvfp4_codes.cuh", " | ((nan << 1) - (nan >> 7))", ""),
    ("grouped_nvfp4", "a slot for its token"): (FRAME, "if (p.sharing > 1) from /= p.sharing;", ""),
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
        LOADS, "~uint64_t(0) >> (64 - 8 * blocks)", "~uint64_t(0)"),
    ("nvfp4", "one half's scales for both"): (LOADS, "const int row = i / 2 * 64 + i % 2;", "const int row = i % 2;"),
    ("nvfp4", "scales not waited for"): (FRAME90, "init_barrier(b.landed + i, Format::kLoaded)",
                                         "init_barrier(b.landed + i, 1)"),
    ("nvfp4", "NaN is 480"): ("nvfp4_codes.cuh", " | ((nan << 4) - (nan >> 5))", ""),
    ("nvfp4", "one scale for two blocks"): (
        "nvfp4_codes.cuh", "scale_pair<T, kWord / 2>(codes_of<T, kCode + 1>(word)",
        "scale_pair<T, 0>(codes_of<T, kCode + 1>(word)"),
    ("nvfp4", "codes without swizzle"): (
        None, "swizzled_half(row * 64 + lane % 4 * 16)", "row * 64 + lane % 4 * 16"),
    ("nvfp4", "odd rows like even ones"): (LOADS, "parity * pitch + unit.k / 4", "unit.k / 4"),
    ("nvfp4", "inputs in another order"): (
        LOADS, "const uint32_t second[2] = {i ? v[0].w : v[0].z, i ? v[1].w : v[1].z};",
        "const uint32_t second[2] = {i ? v[0].z : v[0].w, i ? v[1].z : v[1].w};"),
    ("nvfp4", "rows behind the inner size"): (FRAME90, "const bool inside = row < rows;", "const bool inside = true;"),
    ("nvfp4", "a stage released before it is read"): (
        None, "hopper::wait(b.landed + at.stage, at.parity);\n    const char* stage",
        "hopper::wait(b.landed + at.stage, at.parity);\n    release(b.empty + at.stage);\n    const char* stage"),
    ("nvfp4", "stages' parity stays"): (ITEMS, "parity ^= 1;", ""),
    ("nvfp4", "one place of activations"): (FRAME90, "chunk += 2, slot ^= 1", "chunk += 2"),
    ("nvfp4", "products not waited for"): (None, "    hopper::wait_products<0>();\n    hopper::pin(h);", ""),
    ("nvfp4", "inputs wait for another item's"): (FRAME90, "uint32_t(n + 1) % 2", "uint32_t(n) % 2"),
    ("nvfp4", "rows of the gate for all"): (None, "(kGated ? 2 : 1) * p.inner", "p.inner"),
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
