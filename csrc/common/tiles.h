// Products of small float matrices in scratch memory, by register tiles; compiled once per instruction set (lanes.h).
//
// A tile is kTileRows rows by V vectors of columns of C, held in registers while the terms of C (+)= A B come in:
//   A  Columns{p, ld}: element (row, k) is p[k * ld + row]: A lies in memory as its transpose (A^T B)
//      Rows<ld>{p}:    element (row, k) is p[row * ld + k], the leading dimension a constant, so that the addresses of
//                      a tile's rows are constants too
//   B  row k is at b + k * ldb, its columns contiguous. (A B^T: transpose B first; see transpose().)
// Row tiles may be computed in any order and on any thread: an element of C is one chain of fused multiply-adds, over k
// ascending, begun with what the tile held. So its bits depend neither on tile, panel nor vector sizes.
//
// Nothing is masked: a last tile has all its rows, and a last panel of columns whole vectors. What they read beyond the
// matrices is only used for elements beyond the matrices, so memory must be there (kTileRows - 1 more rows of C and of
// the triangle's B, kTileRows - 1 more floats behind A, zeros or any other numbers) and the result is to be ignored.
//
//   for_panels(cols, [&](auto vectors, int64_t col) {           // vectors: 2, or 1 for a last panel of one vector
//     for (int64_t row = 0; row < rows; row += kTileRows) {
//       Tile<vectors> tile;
//       tile.zero();                                            // or tile.load(...), tile.scale(...)
//       tile.add(Columns{a + row, lda}, b + col, ldb, 0, depth);
//       tile.store(c + row * ldc + col, ldc);
//     }
//   });
#pragma once
#include <algorithm>
#include <type_traits>
#include <utility>

#include "lanes.h"

namespace n3 {
namespace {

// 26 accumulators of 32 registers, 12 of 16; 64, 128 and 256 rows are filled to 98 %.
constexpr int kTileRows = kLanes == 16 ? 13 : 6;
constexpr int kTileVectors = 2;
constexpr int64_t kPanel = kTileVectors * kLanes;  // columns of a whole panel

// Rows of memory for a matrix of `rows` rows that is computed by tiles.
constexpr int64_t whole_tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows * kTileRows; }

// Columns of memory for `cols` columns in whole vectors.
constexpr int64_t whole_vectors(int64_t cols) { return (cols + kLanes - 1) / kLanes * kLanes; }

struct Columns {
  const float* p;
  int64_t ld;

  N3_LANE_FN float at(int row, int64_t k) const { return p[k * ld + row]; }
};

template <int64_t kLd>
struct Rows {
  const float* p;

  N3_LANE_FN float at(int row, int64_t k) const { return p[row * kLd + k]; }
};

template <int V>
struct Tile {
  F32 v[kTileRows][V];

  N3_LANE_FN void zero() {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < V; ++c) v[r][c] = F32{};
    }
  }

  N3_LANE_FN void load(const float* p, int64_t ld) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < V; ++c) v[r][c] = n3::load(p + r * ld + c * kLanes);
    }
  }

  N3_LANE_FN void store(float* p, int64_t ld) const {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < V; ++c) n3::store(p + r * ld + c * kLanes, v[r][c]);
    }
  }

  N3_LANE_FN void scale(float factor) {
    const F32 f = splat(factor);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      for (int c = 0; c < V; ++c) v[r][c] *= f;
    }
  }

  // Row r by factors[r].
  N3_LANE_FN void scale_rows(const float* factors) {
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const F32 f = splat(factors[r]);
      for (int c = 0; c < V; ++c) v[r][c] *= f;
    }
  }

  // Terms begin <= k < end.
  template <typename A>
  N3_LANE_FN void add(A a, const float* b, int64_t ldb, int64_t begin, int64_t end) {
#pragma GCC unroll 2
    for (int64_t k = begin; k < end; ++k) {
      F32 bk[V];
      for (int c = 0; c < V; ++c) bk[c] = n3::load(b + k * ldb + c * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) {
        const F32 ak = splat(a.at(r, k));
        for (int c = 0; c < V; ++c) v[r][c] = fma(ak, bk[c], v[r][c]);
      }
    }
  }

  // A lower triangular: terms k <= row of rows first, first + 1, ...; elements above the diagonal are not read. `a` is
  // placed at row `first` and k = 0.
  template <typename A>
  N3_LANE_FN void add_lower(A a, const float* b, int64_t ldb, int64_t first) {
    add(a, b, ldb, 0, first);
    add_corner(a, b, ldb, first);
  }

 private:
  // The kTileRows x kTileRows block on the diagonal.
  template <typename A>
  N3_LANE_FN void add_corner(A a, const float* b, int64_t ldb, int64_t first) {
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; ++i) {
      F32 bk[V];
      for (int c = 0; c < V; ++c) bk[c] = n3::load(b + (first + i) * ldb + c * kLanes);
#pragma GCC unroll 16
      for (int r = i; r < kTileRows; ++r) {
        const F32 ak = splat(a.at(r, first + i));
        for (int c = 0; c < V; ++c) v[r][c] = fma(ak, bk[c], v[r][c]);
      }
    }
  }
};

// Calls body(vectors, col) for each panel of columns, `vectors` a constant of type integral_constant.
template <typename Body>
N3_LANE_FN void for_panels(int64_t cols, const Body& body) {
  for (int64_t col = 0; col < cols; col += kPanel) {
    if (cols - col > kLanes) {
      body(std::integral_constant<int, 2>{}, col);
    } else {
      body(std::integral_constant<int, 1>{}, col);
    }
  }
}

// Of lanes a and b, those of the blocks of kBlock lanes at even places: a0 b0 a2 b2 ..; or at odd ones: a1 b1 a3 b3 ..
template <int kBlock, bool kOdd, size_t... kLane>
N3_LANE_FN F32 blocks_of(F32 a, F32 b, std::index_sequence<kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (kLane & kBlock ? kLanes + kLane - !kOdd * kBlock : kLane + kOdd * kBlock)...);
#else
  return __builtin_shuffle(a, b, I32{(kLane & kBlock ? kLanes + kLane - !kOdd * kBlock : kLane + kOdd * kBlock)...});
#endif
}

// Exchanges lane j of v[i] and lane i of v[j], for the bits kBlock and above of i and j.
template <int kBlock = 1>
N3_LANE_FN void transpose(F32 (&v)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kBlock) continue;
    const F32 a = v[i], b = v[i + kBlock];
    v[i] = blocks_of<kBlock, false>(a, b, std::make_index_sequence<kLanes>());
    v[i + kBlock] = blocks_of<kBlock, true>(a, b, std::make_index_sequence<kLanes>());
  }
  if constexpr (2 * kBlock < kLanes) transpose<2 * kBlock>(v);
}

// out[c * ld_out + r] = in[r * ld_in + c].
inline void transpose(const float* in, int64_t ld_in, int64_t rows, int64_t cols, float* out, int64_t ld_out) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    for (int64_t c = 0; c < cols; c += kLanes) {
      if (r + kLanes <= rows && c + kLanes <= cols) {
        F32 v[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) v[i] = load(in + (r + i) * ld_in + c);
        transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(out + (c + i) * ld_out + r, v[i]);
        continue;
      }
      for (int64_t j = c; j < std::min(c + kLanes, cols); ++j) {
        for (int64_t i = r; i < std::min(r + kLanes, rows); ++i) out[j * ld_out + i] = in[i * ld_in + j];
      }
    }
  }
}

}  // namespace
}  // namespace n3
