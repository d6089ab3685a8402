// The CPU products of NVFP4 matrices in AMX tiles: rows of a become bfloat16, which holds code times block scale
// exactly, and meet rows of b in the kernels of nvfp4_linear.
#include "../common/buffer.h"
#include "../common/numerics.h"
#include "../common/threads.h"
#include "gemm_batches.h"
#include "linear_engine.h"

namespace n3::nvfp4_gemm {
namespace {

namespace amx = nvfp4_linear::amx;

// The bfloat16 bits of the 16 codes under each scale byte.
using Decoded = uint16_t[256][16];

const Decoded& decoded() {
  static const auto table = [] {
    auto made = buffer<uint16_t[16]>(sizeof(Decoded));
    for (int scale = 0; scale < 256; ++scale) {
      for (int code = 0; code < 16; ++code) {
        const float v = e2m1_to_float(uint8_t(code)) * e4m3_to_float(uint8_t(scale));
        made[scale][code] = uint16_t(float_bits(v) >> 16);  // exact; a NaN's payload stays in the upper half
      }
    }
    return made;
  }();
  return reinterpret_cast<const Decoded&>(*table.get());
}

// One row's scales in the order of k: where they lie, or copied out of 128x4 tiles.
const uint8_t* scales_of(const uint8_t* scale, bool swizzled, int64_t row, int64_t blocks, uint8_t* copy) {
  if (!swizzled) return scale + row * blocks;
  for (int64_t i = 0; i < blocks; ++i) copy[i] = scale[scale_128x4(row, i, blocks)];
  return copy;
}

void decode_row(const Matrix& a, int64_t row, int64_t k, uint8_t* scales, uint16_t* to) {
  const uint8_t* q = a.q + row * (k / 2);
  const uint8_t* scale = scales_of(a.scale, a.swizzled, row, k / 16, scales);
  const Decoded& values = decoded();
  for (int64_t i = 0; i < k / 16; ++i) {
    const uint16_t(&of)[16] = values[scale[i]];
    for (int64_t j = 8 * i; j < 8 * i + 8; ++j) {
      to[2 * j] = of[q[j] & 15];
      to[2 * j + 1] = of[q[j] >> 4];
    }
  }
}

// Where the tiles of each piece of a batch begin, in bytes, and where the last ends.
std::vector<int64_t> places(const Batch& batch, int64_t k) {
  std::vector<int64_t> at{0};
  for (const Batch::Piece& piece : batch.pieces) {
    const int64_t tokens = piece.rows.tokens;
    at.push_back(at.back() + amx::tiles_of(tokens) * amx::tile_bytes(k, tokens));
  }
  return at;
}

void pack(const Params& p, const amx::Kernels& kernel, const Batch& batch, const std::vector<int64_t>& at, char* x) {
  struct Tile {
    int64_t first, rows, width;
    char* to;
  };
  std::vector<Tile> all;
  for (size_t i = 0; i < batch.pieces.size(); ++i) {
    const Segment& s = batch.pieces[i].rows;
    for (int64_t t = 0; t < amx::tiles_of(s.tokens); ++t) {
      const int64_t t0 = t * amx::kTileTokens;
      all.push_back({s.first + t0, std::min(amx::kTileTokens, s.tokens - t0), amx::tile_width(s.tokens),
                     x + at[i] + t * amx::tile_bytes(p.k, s.tokens)});
    }
  }
  torch::stable::parallel_for(0, int64_t(all.size()), 1, [&](int64_t begin, int64_t end) {
    const auto rows = buffer<uint16_t>(amx::kTileTokens * p.k * 2);
    const auto scales = buffer<uint8_t>(p.k / 16);
    const void* of[amx::kTileTokens];
    for (int64_t i = begin; i < end; ++i) {
      const Tile& tile = all[i];
      for (int64_t t = 0; t < tile.rows; ++t) {
        decode_row(p.a, tile.first + t, p.k, scales.get(), rows.get() + t * p.k);
        of[t] = rows.get() + t * p.k;
      }
      kernel.pack(of, tile.rows, p.k, tile.width, tile.to);
    }
  });
}

// One item is a panel of rows of b with the tokens of one piece, so an output has one owner.
void run(const Params& p, const amx::Kernels& kernel, const Batch& batch, const std::vector<int64_t>& at,
         const char* x) {
  const int64_t blocks = p.k / 16, panels = (p.n + amx::kPanelRows - 1) / amx::kPanelRows;
  const int64_t b_bytes = p.n * p.k / 2, b_scales = scale_bytes(p.b.swizzled, p.n, p.k);
  const int64_t items = int64_t(batch.pieces.size()) * panels;
  const Finish finish = finish_of(p);
  int64_t most = 0;
  for (const Batch::Piece& piece : batch.pieces) most = std::max(most, piece.rows.tokens);
  const void* table = nvfp4_linear::split_global_scale(kernel.decoding, 1.f).table;
  for_items(items, batch.tokens * p.n * p.k / 8, [&](const auto& take) {  // a product here costs an eighth
    const auto scratch = buffer<char>(kernel.scratch_bytes(p.k, most));
    const auto sums = buffer<float>(amx::kPanelRows * most * 4);
    const auto scales = buffer<uint8_t>(amx::kPanelRows * blocks);
    for (int64_t i = take(); i < items; i = take()) {
      const int64_t piece = i / panels, n0 = i % panels * amx::kPanelRows, rows = std::min(amx::kPanelRows, p.n - n0);
      const Segment& s = batch.pieces[piece].rows;
      const uint8_t* of_expert = p.b.scale + s.expert * b_scales;
      const uint8_t* scale = of_expert + n0 * blocks;
      if (p.b.swizzled) {
        scale = scales.get();
        for (int64_t r = 0; r < rows; ++r) scales_of(of_expert, true, n0 + r, blocks, scales.get() + r * blocks);
      }
      const nvfp4_linear::Panel panel{p.b.q + s.expert * b_bytes + n0 * (p.k / 2), scale, rows, p.k};
      kernel.sums(table, panel, x + at[piece], s.tokens, scratch.get(), sums.get());
      finish(p, {s, n0, rows, amx::kPanelRows, sums.get()});
    }
  });
}

}  // namespace

void multiply_tiles(const Params& p, const std::vector<Segment>& segments, const amx::Kernels& kernel) {
  Buffer<char> x;
  int64_t room = 0;
  for (const Batch& batch : batches(segments, amx::tokens_per_call(p.m, p.k))) {
    const std::vector<int64_t> at = places(batch, p.k);
    if (at.back() > room) x = buffer<char>(room = at.back());
    pack(p, kernel, batch, at, x.get());
    run(p, kernel, batch, at, x.get());
  }
}

}  // namespace n3::nvfp4_gemm
