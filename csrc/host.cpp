// The pybind11 module n3kernels._host: facts of this build and the host-executable maths the kernels compile, for
// tests and tools. Nothing that computes imports it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/cpu.h"
#include "common/numerics.h"
#include "common/philox.h"
#include "mamba/conv1d_plan.h"
#include "mamba/gated_norm_plan.h"
#include "mamba/mamba2_decode_plan.h"
#include "mamba/ssd_scan_plan.h"
#include "mamba/ssm_update_plan.h"
#include "moe/counter_pool.h"
#include "moe/experts_nvfp4_plan.h"
#include "moe/experts_plan.h"
#include "moe/latent_plan.h"
#include "nvfp4/linear_plan.h"
#include "nvfp4/linear_packed_plan.h"
#include "nvfp4/quantize_plan.h"

#ifndef N3_ARCHS
#define N3_ARCHS ""
#endif
#ifndef N3_REVISION
#define N3_REVISION "unknown"
#endif
#ifndef N3_TORCH_VERSION
#define N3_TORCH_VERSION "unknown"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.def("build_info", [] {
    py::dict info;
    info["archs"] = N3_ARCHS;
    info["revision"] = N3_REVISION;
    info["torch"] = N3_TORCH_VERSION;
    return info;
  });
  m.def("cpu_isa", [] { return n3::isa_name(n3::cpu_isa()); });
  m.def("e2m1_from_float", py::vectorize([](float v) { return n3::e2m1_from_float(v); }));
  m.def("e2m1_to_float", py::vectorize([](uint8_t code) { return n3::e2m1_to_float(code); }));
  m.def("e4m3_from_float", py::vectorize([](float v) { return n3::e4m3_from_float(v); }));
  m.def("e4m3_to_float", py::vectorize([](uint8_t code) { return n3::e4m3_to_float(code); }));
  m.def(
      "philox4x32",
      [](uint64_t key, uint64_t counter_low, uint64_t counter_high) {
        const auto p = n3::philox4x32(key, counter_low, counter_high);
        return py::make_tuple(p.word[0], p.word[1], p.word[2], p.word[3]);
      },
      py::arg("key"), py::arg("counter_low"), py::arg("counter_high"));
  m.def("scale_128x4",
        py::vectorize([](int64_t r, int64_t ks, int64_t ks_total) { return n3::scale_128x4(r, ks, ks_total); }),
        py::arg("r"), py::arg("ks"), py::arg("ks_total"));
  // Plans of the CUDA kernels: (kernel, blocks, threads, tokens).
  m.def(
      "nvfp4_linear_plan",
      [](int64_t rows, int64_t n, bool float32, bool invariant) {
        const auto p = n3::nvfp4_linear::plan(rows, n, float32, invariant);
        return py::make_tuple(int(p.kernel), p.blocks, p.threads, p.tokens);
      },
      py::arg("m"), py::arg("n"), py::arg("float32"), py::arg("invariant"));
  m.def("nvfp4_linear_slot_k", &n3::nvfp4_linear::slot_k, py::arg("t"), py::arg("step"), py::arg("i"));
  // nvfp4_linear.packed: (kernel, splits of k, blocks along rows and tokens, blocks, threads, shared memory) on a GPU of
  // that compute capability (times ten); a warp's tiles along k. And the bit maths of nvfp4_repack: a word of eight codes, its registers, scales.
  m.def(
      "nvfp4_linear_packed_plan",
      [](int64_t rows, int64_t n, int64_t k, bool invariant, int capability) {
        namespace packed = n3::nvfp4_linear_packed;
        const auto p = packed::plan(rows, n, k, invariant, packed::cores_of(capability));
        return py::make_tuple(int(p.kernel), p.splits, p.row_groups, p.token_groups, p.blocks, p.threads, p.shared);
      },
      py::arg("m"), py::arg("n"), py::arg("k"), py::arg("invariant"), py::arg("capability") = 90);
  m.def("nvfp4_linear_packed_tiles", [](int32_t tiles, int32_t splits, int32_t rank, int32_t warp) {
    const auto range = n3::nvfp4_linear_packed::warp_tiles(tiles, splits, rank, warp);
    return py::make_tuple(range.begin, range.end);
  });
  m.def("nvfp4_pack_codes", [](const std::vector<int>& codes) {
    uint8_t c[4][2];
    for (int i = 0; i < 8; ++i) c[i / 2][i % 2] = uint8_t(codes.at(i));
    return n3::nvfp4_repack::pack_codes(c);
  });
  m.def("nvfp4_codes", [](uint32_t word, bool half) {
    uint32_t r[4];
    half ? n3::nvfp4_repack::codes_f16(word, r) : n3::nvfp4_repack::codes_bf16(word, r);
    return std::vector<uint32_t>(r, r + 4);
  });
  m.def("nvfp4_pack_scale", [](uint8_t e4m3) { return int(n3::nvfp4_repack::pack_scale(e4m3)); });
  m.def("nvfp4_unpack_scale", [](uint8_t byte) { return int(n3::nvfp4_repack::unpack_scale(byte)); });
  // Tiles of the quantisers: (count, side by side, log of their width in blocks of 16, height in rows); of x.mT also
  // (tiles of a matrix one below the other, parts of a row whose maxima are found apart).
  m.def("nvfp4_quantize_tiles", [](const std::string& kind, int64_t rows, int64_t ks) {
    namespace quantize = n3::nvfp4_quantize;
    const auto make = kind == "rows" ? quantize::row_tiles
                                     : kind == "whole rows" ? quantize::whole_row_tiles : quantize::square_tiles;
    const auto t = make(rows, ks);
    return py::make_tuple(t.count, t.across, t.log_width, t.height);
  });
  m.def("nvfp4_quantize_transposed_tiles", [](int64_t rows, int64_t ks, int64_t rows_each, bool swizzled) {
    const auto t = n3::nvfp4_quantize::transposed_tiles(rows, ks, rows_each, swizzled);
    return py::make_tuple(t.tiles.count, t.tiles.across, t.down, n3::nvfp4_quantize::row_splits(t));
  });
  m.def("nvfp4_quantize_quotient",
        [](uint32_t n, int64_t d) { return n3::nvfp4_quantize::divider(d).quotient(n); });

  // (threads of a group, blocks); (tiles, channel blocks, blocks); (lanes, groups of 4, vectors, tiles, blocks);
  // (fused, blocks, bytes of shared memory, width).
  m.def("gated_norm_plan", [](int64_t rows, int64_t groups, int64_t group_size) {
    const auto p = n3::gated_norm::plan(rows, groups, group_size);
    return py::make_tuple(p.threads, p.blocks);
  });
  m.def("conv1d_plan", [](int64_t tokens, int64_t states, int64_t channels, int64_t vector) {
    const auto p = n3::causal_conv1d::plan(tokens, states, channels, vector);
    return py::make_tuple(p.tiles, p.channel_blocks, p.blocks);
  });
  m.def("ssm_update_plan", [](int64_t batch, int64_t heads, int64_t head_dim, int64_t d_state, bool vectors) {
    const auto p = n3::ssm_update::plan(batch, heads, head_dim, d_state, vectors);
    return py::make_tuple(p.shape.lanes, p.shape.groups, p.shape.vectors, p.tiles, p.blocks);
  });
  m.def("mamba2_decode_plan", [](int64_t batch, int64_t tokens, int64_t heads, int64_t groups, int64_t head_dim,
                                 int64_t d_state, int64_t group_size, bool vectors, bool tree) {
    const auto p = n3::mamba2::decode_plan(
        {batch, tokens, heads, groups, head_dim, d_state, group_size, vectors, tree});
    return py::make_tuple(p.fused, p.blocks, p.shared_bytes, p.width);
  });

  // ssd_scan on sm_90: the plan, the tiles of its items, where an element lies in shared memory, factors of a decay.
  namespace scan = n3::ssd_scan::sm90;
  const auto scan_plan = [](int64_t sequences, bool packed, int64_t heads, int64_t groups, int64_t head_dim,
                            int64_t d_state, int64_t multiprocessors) {
    return scan::plan(sequences, packed, heads, groups, head_dim, d_state, multiprocessors);
  };
  m.def("ssd_scan_plan", [scan_plan](int64_t s, bool packed, int64_t h, int64_t g, int64_t p, int64_t n, int64_t sms) {
    const scan::Plan plan = scan_plan(s, packed, h, g, p, n, sms);
    const auto [wide_n, wide_p] = scan::with_tile(plan.kernel, [](auto* type) {
      using Tile = std::remove_pointer_t<decltype(type)>;
      return std::pair(Tile::kN, Tile::kP);
    });
    return py::make_tuple(wide_n, wide_p, plan.blocks, plan.threads, plan.shared, plan.stages, plan.work.items);
  });
  m.def("ssd_scan_tiles", [scan_plan](int64_t s, bool packed, int64_t h, int64_t g, int64_t p, int64_t n, int64_t sms) {
    const scan::Plan plan = scan_plan(s, packed, h, g, p, n, sms);
    py::list tiles;
    scan::with_tile(plan.kernel, [&](auto* type) {
      using Tile = std::remove_pointer_t<decltype(type)>;
      for (int32_t i = 0; i < plan.work.items; ++i) {
        const scan::Item item = scan::item_at(plan.work, i);
        for (int w = 0; w < Tile::kWarpgroups; ++w) {
          const scan::TileAt tile = scan::tile_at(plan.work, item, w, Tile::kP);
          if (tile.exists) tiles.append(py::make_tuple(i, item.sequence, item.group, tile.head, tile.channel));
        }
      }
    });
    return tiles;
  });
  m.def("ssd_scan_element_at", [](int columns, int row, int col, int rows) {
    return columns == 64 ? scan::element_at<64>(row, col, rows) : scan::element_at<16>(row, col, rows);
  });
  m.def("ssd_scan_element_from", [](int columns, int corner, int eight, int j, int rows) {
    return columns == 64 ? scan::element_from<64>(corner, eight, j, rows)
                         : scan::element_from<16>(corner, eight, j, rows);
  });
  m.def("ssd_scan_log2_decay", py::vectorize([](float A, float dt) { return scan::log2_decay(A, dt); }));
  m.def("ssd_scan_decay_between", py::vectorize([](float a_i, float a_j) { return scan::decay_between(a_i, a_j); }));
  m.def("ssd_scan_row_factor", py::vectorize([](float a_i, float r) { return scan::row_factor(a_i, r); }));
  m.def("ssd_scan_column_factor",
        py::vectorize([](float a_j, float r, float dt) { return scan::column_factor(a_j, r, dt); }));
  m.def("ssd_scan_end_factor",
        py::vectorize([](float a_j, float end, float dt) { return scan::end_factor(a_j, end, dt); }));
  m.def("ssd_scan_first_column", [](int block) { return scan::first_column(block); });

  // moe_experts on sm_90, dense or NVFP4 weights: (width and tokens of the template, blocks, rows, counters, shared
  // memory, stages); the ranges of the inner size in chunks; (expert, its tile, first range, range behind the last) of
  // the items, from the slots of each expert.
  namespace experts = n3::moe_experts::sm90;
  namespace nvfp4_experts = n3::moe_experts::sm90::nvfp4;
  m.def("moe_experts_plan", [](int64_t t, int64_t k, int64_t e, int64_t width, int64_t inner, int64_t sms, bool packed,
                               bool gated) {
    const experts::Kernel kernel = packed ? nvfp4_experts::kernel_for(width, gated) : experts::kernel_for(width);
    const auto plan = packed ? experts::plan<nvfp4_experts::PackedRing> : experts::plan<experts::DenseRing>;
    const experts::Plan p = plan(kernel, t, k, e, width, inner, sms);
    const auto width_of = [](auto* type) { return std::remove_pointer_t<decltype(type)>::kWidth; };
    const int wide = experts::with_tile(p.kernel, width_of);
    return py::make_tuple(wide, p.tokens, p.blocks, p.rows, p.counters, p.shared, p.stages);
  });
  m.def("moe_experts_launch_tokens", &experts::tokens_of_a_launch);
  m.def("moe_experts_ranges", [](int64_t width, int64_t inner) {
    py::list ranges;
    const int32_t chunks = experts::chunks_of(inner), count = experts::ranges_of(width, inner);
    for (int32_t r = 0; r < count; ++r) {
      const experts::Range range = experts::range_at(chunks, count, r);
      ranges.append(py::make_tuple(range.begin, range.end));
    }
    return ranges;
  });
  m.def("moe_experts_items",
        [](const std::vector<int32_t>& slots, int64_t t, int64_t k, int64_t width, int64_t inner) {
          const int32_t e = int32_t(slots.size());
          const experts::Plan p =
              experts::plan<experts::DenseRing>(experts::kernel_for(width), t, k, e, width, inner, 132);
          std::vector<int32_t> before(e + 1);
          for (int32_t i = 0; i < e; ++i) before[i + 1] = before[i] + experts::tiles_in(slots[i], p.tokens);
          py::list items;
          for (int32_t i = 0; i < experts::items_of(p.work, before.data()); ++i) {
            const experts::Place at = experts::place_at(p.work, before.data(), i);
            items.append(py::make_tuple(at.expert, at.tile, at.first_range, at.last_range));
          }
          return items;
        });
  // Counters in a pool of zeros: take(capture, stream, words) is where they begin, or -1.
  py::class_<n3::CounterPool>(m, "CounterPool").def(py::init<int64_t>()).def("take", &n3::CounterPool::take);
  // NVFP4 weights: where k of a unit stands in operand b; the registers of eight codes; (what half a scale is multiplied
  // by, as bfloat16 bits, and what sums are, after 2^8).
  m.def("moe_experts_nvfp4_position", &nvfp4_experts::position_of);
  m.def("moe_experts_nvfp4_codes", [](uint32_t w) {
    return py::make_tuple(nvfp4_experts::codes_bf16<0>(w), nvfp4_experts::codes_bf16<1>(w),
                          nvfp4_experts::codes_bf16<2>(w), nvfp4_experts::codes_bf16<3>(w));
  });
  m.def("moe_experts_nvfp4_global", [](float global) {
    const nvfp4_experts::Global g = nvfp4_experts::global_of(global);
    return py::make_tuple(g.factor, g.rest);
  });

  // latent_moe_front and latent_moe_tail on sm_90: (tokens and rows of a tile, shared memory, stages, blocks of a
  // cluster, [(tiles, steps, parts)]), and per block (section, tile, tile of tokens, first step, step behind the last).
  namespace latent = n3::latent_moe::sm90;
  const auto described = [](const latent::Plan& p) {
    py::list sections, places;
    for (const latent::Section& s : p.work.sections) sections.append(py::make_tuple(s.tiles, s.steps, s.parts));
    for (int64_t block = 0; block < p.blocks; ++block) {
      const latent::Place at = latent::place_of(p.work, block);
      const latent::Range steps = latent::steps_of(p.work.sections[at.section], at.part);
      places.append(py::make_tuple(at.section, at.tile, at.token_tile, steps.begin, steps.end));
    }
    return py::make_tuple(py::make_tuple(p.tokens, p.rows, p.shared, p.stages, p.work.cluster, sections), places);
  };
  m.def("latent_front_plan", [described](int64_t tokens, int64_t width, int64_t experts, int64_t latent_width,
                                         int64_t inner, bool wide_router, bool invariant) {
    return described(latent::front_plan(tokens, width, experts, latent_width, inner, wide_router, invariant));
  });
  m.def("latent_tail_plan", [described](int64_t tokens, int64_t width, int64_t latent_width, int64_t inner,
                                        bool invariant) {
    return described(latent::tail_plan(tokens, width, latent_width, inner, invariant));
  });
}
