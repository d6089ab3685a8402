// The ordered sum over a token's slots, from the rows that the experts left; and ids without those of padding rows.
#pragma once
#include "items.cuh"

namespace n3::moe_experts {

struct Combine {
  const float* rows;     // [tokens, top_k, parts, width]
  const float* weights;  // [tokens, top_k]
  const int32_t* ids;    // [tokens, top_k]
  void* y;               // [tokens, width], bfloat16 or float32
  bool float_y;
  int32_t top_k, parts, width;
  int64_t first_expert;
  int32_t experts;
};

// y[t] = sum_j weights[t, j] * (sum_r rows[t, j, r]), r and j ascending, rounded once. Rows of skipped slots are not
// read and add 0, whatever the weight.
//   grid  a token's blocks of kCombineColumns columns, side by side     block  kCombineWarps warps, each a slot
static __global__ __launch_bounds__(32 * sm90::kCombineWarps, 4) void combine_kernel(const Combine c) {
  using sm90::kCombineColumns, sm90::kCombineSlots, sm90::kCombineWarps;
  __shared__ float4 terms[kCombineSlots][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t blocks = uint32_t(c.width + kCombineColumns - 1) / kCombineColumns;
  const int64_t token = blockIdx.x / blocks;
  const int column = int(blockIdx.x % blocks) * kCombineColumns + 4 * lane;
  const bool inside = column < c.width;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int from = 0; from < c.top_k; from += kCombineSlots) {
    const int to = c.top_k - from < kCombineSlots ? c.top_k : from + kCombineSlots;
    for (int j = from + warp; j < to; j += kCombineWarps) {
      const int64_t slot = token * c.top_k + j;
      const int64_t expert = int64_t(c.ids[slot]) - c.first_expert;
      float4 term = make_float4(0.f, 0.f, 0.f, 0.f);
      if (inside && expert >= 0 && expert < c.experts) {
        const float* row = c.rows + slot * c.parts * c.width + column;
        float4 s = *reinterpret_cast<const float4*>(row);
#pragma unroll 4
        for (int r = 1; r < c.parts; ++r) {
          const float4 v = *reinterpret_cast<const float4*>(row + int64_t(r) * c.width);
          s.x += v.x, s.y += v.y, s.z += v.z, s.w += v.w;
        }
        const float w = c.weights[slot];
        term = make_float4(w * s.x, w * s.y, w * s.z, w * s.w);
      }
      terms[j - from][lane] = term;
    }
    __syncthreads();
    if (warp == 0) {
      for (int j = from; j < to; ++j) {
        const float4 v = terms[j - from][lane];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
      }
    }
    __syncthreads();
  }
  if (warp || !inside) return;
  sm90::store_four(c.y, c.float_y, token * c.width + column, sum);
}

// ids with -1 in the rows from valid_tokens on. One element per thread.
static __global__ void valid_ids_kernel(const int32_t* ids, const int32_t* valid_tokens, int32_t* to, int64_t slots,
                                        int64_t top_k, int threads) {
  const int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x;
  if (i < slots) to[i] = i / top_k < *valid_tokens ? ids[i] : -1;
}

}  // namespace n3::moe_experts
