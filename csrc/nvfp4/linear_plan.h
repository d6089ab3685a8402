// How nvfp4_linear runs on a GPU: which kernel, on which grid, and which k a lane holds. Pure host arithmetic.
#pragma once
#include <cstdint>

#include "../common/numerics.h"

namespace n3::nvfp4_linear {

enum class Kernel {
  kRows,      // few rows of x: a warp for every few rows of the weights, FMA
  kTensor16,  // tensor cores, tiles of 16, 64 or 128 rows of x
  kTensor64,
  kTensor128,
  kFma,  // float32 x: tensor cores would round it
};

// Tiles of the tensor core kernels: kTileM x kTileN outputs by kWarpsM x kWarpsN warps, kTileK of k per stage.
template <int kTileM_, int kTileN_, int kWarpsM_, int kWarpsN_, int kStages_>
struct Tile {
  static constexpr int kTileM = kTileM_, kTileN = kTileN_, kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kStages = kStages_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kFragmentsM = kTileM / kWarpsM / 16, kFragmentsN = kTileN / kWarpsN / 8;
};
using Tile16 = Tile<16, 64, 1, 4, 4>;
using Tile64 = Tile<64, 64, 2, 2, 3>;
using Tile128 = Tile<128, 128, 2, 4, 2>;

constexpr int kTileK = 64;      // four scale blocks: one for each thread of a quad
constexpr int kRowsWarps = 4;   // kRows: warps of a block
constexpr int kRowsTokens = 8;  // kRows: most rows of x
constexpr int kFmaTile = 64;    // kFma: outputs of a block, squared

// kRows: rows of the weights that a warp sums at a time. More rows reuse x more often and need more registers.
constexpr int rows_per_warp(int tokens) { return tokens <= 2 ? 4 : 2; }

struct Plan {
  Kernel kernel;
  int64_t blocks;
  int threads;
  int tokens;  // kRows: the template's, m rounded up to a power of two
};

N3_HD int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

template <typename T>
Plan tensor_plan(Kernel kernel, int64_t m, int64_t n) {
  return {kernel, tiles_of(m, T::kTileM) * tiles_of(n, T::kTileN), T::kThreads, 0};
}

// In batch-invariant mode the kernel does not depend on m: a row's sum then runs in one order, whatever the batch.
inline Plan plan(int64_t m, int64_t n, bool float32, bool invariant) {
  if (m <= kRowsTokens && !invariant) {
    int tokens = 1;
    while (tokens < m) tokens *= 2;
    return {Kernel::kRows, tiles_of(n, kRowsWarps * rows_per_warp(tokens)), 32 * kRowsWarps, tokens};
  }
  if (float32) return {Kernel::kFma, tiles_of(m, kFmaTile) * tiles_of(n, kFmaTile), 256, 0};
  if (invariant) return tensor_plan<Tile64>(Kernel::kTensor64, m, n);
  if (m <= 16) return tensor_plan<Tile16>(Kernel::kTensor16, m, n);
  if (m <= 512) return tensor_plan<Tile64>(Kernel::kTensor64, m, n);
  return tensor_plan<Tile128>(Kernel::kTensor128, m, n);
}

// The k, within kTileK, of element i = 0..3 that thread t of a quad holds in step = 0..3 of the tile: its elements are
// columns 2t, 2t+1, 2t+8, 2t+9 of the instruction's k16, for x and for the weights alike, so any assignment that covers
// the tile gives the same sum. This one gives a thread 16 neighbouring k: one scale, 8 bytes of codes, 32 bytes of x.
N3_HD int slot_k(int t, int step, int i) { return 16 * t + 4 * step + i; }

}  // namespace n3::nvfp4_linear
