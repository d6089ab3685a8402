#include "../common/buffer.h"
#include "../common/cpu.h"
#include "../common/threads.h"
#include "gemm_batches.h"
#include "gemm_generic.h"
#include "gemm_kernels.h"
#include "linear_engine.h"

namespace n3::nvfp4_gemm {

const Kernels kGenericKernels = kernels_of<Generic>();

const Kernels& kernels() {
#if defined(__x86_64__)
  // VNNI came after AVX-512; without it the byte products of AVX2 serve.
  static const bool vnni = __builtin_cpu_supports("avx512vnni");
  switch (cpu_isa()) {
    case Isa::kAmx:
    case Isa::kAvx512: return vnni ? kVnniKernels : kAvx2Kernels;
    case Isa::kAvx2: return kAvx2Kernels;
    case Isa::kGeneric: break;
  }
#endif
  return kGenericKernels;
}

namespace {

Tokens at(const Tokens& packed, int64_t token, int64_t blocks) {
  return {packed.codes + token * blocks, packed.init + token * blocks, packed.scale + token * blocks};
}

void pack(const Params& p, const Kernels& kernel, const Batch& batch, const Tokens& packed) {
  const int64_t blocks = p.k / 16;
  struct Tile {
    int64_t first, rows, packed;
  };
  std::vector<Tile> all;
  for (const Batch::Piece& piece : batch.pieces) {
    const Tiles tiles{piece.rows.tokens};
    for (int64_t i = 0; i < tiles.count(); ++i) {
      const int64_t t0 = tiles.begin(i);
      all.push_back({piece.rows.first + t0, tiles.begin(i + 1) - t0, piece.packed + t0});
    }
  }
  torch::stable::parallel_for(0, int64_t(all.size()), 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Tile& t = all[i];
      kernel.pack({p.a.q, p.a.scale, p.a.swizzled, t.first, t.rows, blocks}, at(packed, t.packed, blocks));
    }
  });
}

// One item is a panel of rows of b with the tokens of one piece, so an output has one owner.
void run(const Params& p, const Kernels& kernel, const Batch& batch, const Tokens& packed) {
  const int64_t blocks = p.k / 16, panel = kernel.panel_rows, panels = (p.n + panel - 1) / panel;
  const int64_t b_bytes = p.n * p.k / 2, b_scales = scale_bytes(p.b.swizzled, p.n, p.k);
  const int64_t items = int64_t(batch.pieces.size()) * panels;
  const Finish finish = finish_of(p);
  for_items(items, batch.tokens * p.n * p.k / 4, [&](const auto& take) {  // a product here costs a quarter
    const auto scratch = buffer<char>(kernel.scratch_bytes());
    const auto sums = buffer<float>(panel * batch.tokens * 4);
    for (int64_t i = take(); i < items; i = take()) {
      const Batch::Piece& piece = batch.pieces[i / panels];
      const Segment& s = piece.rows;
      const int64_t n0 = i % panels * panel, rows = std::min(panel, p.n - n0);
      const Rows b{p.b.q + s.expert * b_bytes, p.b.scale + s.expert * b_scales, p.b.swizzled, n0, rows, blocks};
      kernel.sums(b, at(packed, piece.packed, blocks), s.tokens, scratch.get(), sums.get());
      finish(p, {s, n0, rows, panel, sums.get()});
    }
  });
}

}  // namespace

void multiply(const Params& p, const std::vector<Segment>& segments) {
  if (const auto* tiles = nvfp4_linear::tile_kernels()) return multiply_tiles(p, segments, *tiles);
  const Kernels& kernel = kernels();
  const int64_t blocks = p.k / 16, most = std::min(p.m, kTokens) * blocks;
  const auto codes = buffer<int8_t[16]>(most * 16);
  const auto init = buffer<int32_t>(most * 4);
  const auto scale = buffer<float>(most * 4);
  const Tokens packed{codes.get(), init.get(), scale.get()};
  for (const Batch& batch : batches(segments, kTokens)) {
    pack(p, kernel, batch, packed);
    run(p, kernel, batch, packed);
  }
}

}  // namespace n3::nvfp4_gemm
