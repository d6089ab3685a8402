// How the experts of nvfp4_grouped_gemm become the groups of one product: where each group's scales lie, and the arrays
// that CUTLASS's grouped kernels read, written on the device as the host knows no offsets. No CUTLASS, no torch.
#pragma once
#include "gemm_plan.h"

namespace n3::nvfp4_grouped_gemm {

using nvfp4_gemm::Call;
using nvfp4_gemm::kTileBytes;
using nvfp4_gemm::kTileRows;

// In memory what cute has: its Shape<int, int, int>, and the run-time part of its layout of block scales
// ((32,4),row_tiles),((16,4),k_tiles),(1,1)) : (((16,4),row_step),((0,1),512),(0,all)).
struct Problem {
  int32_t m, n, k;
};
struct ScaleLayout {
  int32_t row_tiles, k_tiles, one, row_step, all;
};

// One entry for each group.
struct Arrays {
  const uint8_t **a, **a_scale, **b, **b_scale;
  const float **a_global, **b_global;
  void** y;
  int64_t *a_stride, *b_stride, *y_stride;  // in elements
  Problem* problems;
  ScaleLayout *a_layout, *b_layout;
};

// A call's, and what the device knows of it. `a_scale` is of the call's a: linear; b's are in tiles.
struct Groups {
  Call call;
  const int32_t* offsets;  // [experts + 1]
  int64_t experts, out_bytes;
  uint8_t* a_tiles;  // [tiles_of(m, experts), ceil(K / 64), 512]
  Arrays arrays;
};

N3_HD int64_t k_tiles(int64_t k) { return (k + 63) / 64; }
N3_HD int64_t row_tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// The first tile of expert e, whose rows begin at `offset`. The next expert's is at least one tile further, and at
// least as many as e needs: floor((o + m) / 128) + 1 - floor(o / 128) >= ceil(m / 128). No prefix sum over the experts.
N3_HD int64_t first_tile(int64_t offset, int64_t e) { return offset / kTileRows + e; }

// Tiles of rows that the groups may take, whatever the offsets.
inline int64_t tiles_of(int64_t m, int64_t experts) { return m / kTileRows + experts; }

inline int64_t scale_bytes(int64_t m, int64_t k, int64_t experts) {
  return tiles_of(m, experts) * k_tiles(k) * kTileBytes;
}

// Why the kernels do not take a problem, or null; block_scaled_groups in n3kernels/nvfp4/_supports.py asks first, in
// the same words.
inline const char* unsupported(int64_t m, int64_t n, int64_t k, int64_t experts, nvfp4_gemm::Out out, bool b_swizzled) {
  if (const char* reason = nvfp4_gemm::unsupported(m, n, k, out, false, b_swizzled)) return reason;
  return experts == 0 ? "takes at least 1 expert" : nullptr;
}

// The arrays in one piece of memory, which begins at a multiple of 16 bytes; null gives its size.
inline size_t place(Arrays& arrays, char* memory, int64_t experts) {
  size_t used = 0;
  const auto take = [&]<typename T>(T*& array) {
    array = reinterpret_cast<T*>(memory + used);
    used += (size_t(experts) * sizeof(T) + 15) / 16 * 16;
  };
  take(arrays.a), take(arrays.a_scale), take(arrays.b), take(arrays.b_scale), take(arrays.a_global);
  take(arrays.b_global), take(arrays.y), take(arrays.a_stride), take(arrays.b_stride), take(arrays.y_stride);
  take(arrays.problems), take(arrays.a_layout), take(arrays.b_layout);
  return used;
}

}  // namespace n3::nvfp4_grouped_gemm
