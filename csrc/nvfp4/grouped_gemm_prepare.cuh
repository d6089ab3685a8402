// What comes before the grouped product: each group's block scales in 128x4 tiles of its own, the arrays of its
// problem, zeros in rows of no expert. One launch, as each takes longer than most of these bytes.
#pragma once
#include "../common/device.cuh"
#include "grouped_gemm_plan.h"

namespace n3::nvfp4_grouped_gemm {

constexpr int kThreads = 256;

N3_DEVICE ScaleLayout scale_layout(int64_t rows, int64_t k) {
  const int32_t tiles = int32_t(row_tiles(rows)), step = int32_t(k_tiles(k) * kTileBytes);
  return {tiles, int32_t(k_tiles(k)), 1, step, tiles * step};
}

N3_DEVICE void write_group(const Groups& g, int64_t e, int64_t first_row, int64_t rows) {
  const Call& c = g.call;
  const Arrays& to = g.arrays;
  to.problems[e] = {int32_t(rows), int32_t(c.n), int32_t(c.k)};
  to.a[e] = c.a + first_row * (c.k / 2);
  to.a_scale[e] = g.a_tiles + first_tile(first_row, e) * k_tiles(c.k) * kTileBytes;
  to.b[e] = c.b + e * c.n * (c.k / 2);
  to.b_scale[e] = c.b_scale + e * row_tiles(c.n) * k_tiles(c.k) * kTileBytes;
  to.a_global[e] = c.a_global + (c.a_global_per_row ? first_row : 0);
  to.b_global[e] = c.b_global + e;
  to.y[e] = static_cast<char*>(c.y) + first_row * c.n * g.out_bytes;
  to.a_stride[e] = to.b_stride[e] = c.k;
  to.y_stride[e] = c.n;
  to.a_layout[e] = scale_layout(rows, c.k);
  to.b_layout[e] = scale_layout(c.n, c.k);
}

// The last expert whose first tile is not above `tile`, or -1.
N3_DEVICE int64_t expert_of(const Groups& g, int64_t tile) {
  int64_t low = -1, high = g.experts;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first_tile(g.offsets[middle], middle) <= tile ? low : high) = middle;
  }
  return low;
}

//   grid  tiles_of(m, experts): one block for each tile of rows that a group may have     block kThreads     smem none
// A thread moves 4 neighbouring scales of a row. Rows and columns of padding get zeros: uninitialised scales may be
// NaN, and zero codes times NaN are NaN.
__global__ __launch_bounds__(kThreads) void prepare_kernel(Groups g) {
  const Call& c = g.call;
  const int64_t tile = blockIdx.x, e = expert_of(g, tile);
  if (e >= 0) {
    const int64_t first_row = g.offsets[e], rows = g.offsets[e + 1] - first_row;
    const int64_t local = tile - first_tile(first_row, e);
    if (local == 0 && threadIdx.x == 0) write_group(g, e, first_row, rows);
    const int64_t words = k_tiles(c.k), cols = c.k / 16;
    uint8_t* to = g.a_tiles + tile * words * kTileBytes;
    for (int64_t i = threadIdx.x; i < kTileRows * words && local * kTileRows < rows; i += kThreads) {
      const int64_t r = i / words, col = i % words * 4, row = local * kTileRows + r;
      uint32_t word = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (row < rows && col + j < cols) word |= uint32_t(c.a_scale[(first_row + row) * cols + col + j]) << 8 * j;
      }
      *reinterpret_cast<uint32_t*>(to + scale_128x4(r, col, cols)) = word;
    }
  }
  // Rows of no expert are before the first offset and from the last one on; a row is whole units of 16 bytes.
  const int64_t units = c.n * g.out_bytes / 16, before = g.offsets[0] * units, last = g.offsets[g.experts] * units;
  uint4* y = static_cast<uint4*>(c.y);
  for (int64_t i = tile * kThreads + threadIdx.x; i < before + c.m * units - last; i += int64_t(gridDim.x) * kThreads) {
    y[i < before ? i : last + i - before] = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace n3::nvfp4_grouped_gemm
