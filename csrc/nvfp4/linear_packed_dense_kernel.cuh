// nvfp4_linear.packed for very many tokens: the weights decoded once, torch's product, and the end of the operator.
#pragma once
#include "linear_packed_kernel.cuh"

namespace n3::nvfp4_linear_packed {

//   grid  row_tiles(n)     block  kDenseThreads, a warp for every eighth tile     smem  18 KB
// to[n, k] = the weights as the kernels multiply them. Through shared memory: a lane holds pairs, rows are written in
// pieces of 16 bytes.
template <typename T>
__global__ __launch_bounds__(kDenseThreads) void decode_blob_kernel(const __grid_constant__ Problem p,
                                                                     T* __restrict__ to) {
  constexpr int kWarps = kDenseThreads / 32;
  alignas(16) __shared__ uint32_t staged[kWarps][blob::kRows][36];  // 32 words of a row; + 4: rows start in other banks
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t row0 = int64_t(blockIdx.x) * blob::kRows;
  const uint8_t* weights = p.blob + int64_t(blockIdx.x) * blob::row_bytes(p.k) + 16 * lane;
  const Global global = Global::of<T>(*p.global_scale);
  const int32_t tiles = int32_t(blob::depth_tiles(p.k));
  for (int32_t tile = warp; tile < tiles; tile += kWarps) {
    const Weights w = Weights::load(weights + int64_t(tile) * blob::kTile, lane);
    const auto step = [&](auto constant) {
      constexpr int kStep = decltype(constant)::value;
      uint32_t a[4];
      decode<T, kStep>(w.codes, w.scales, global, a);
#pragma unroll
      for (int i = 0; i < 4; ++i) staged[warp][g + i % 2 * 8][8 * kStep + i / 2 * 4 + t] = a[i];
    };
    step(std::integral_constant<int, 0>{});
    step(std::integral_constant<int, 1>{});
    step(std::integral_constant<int, 2>{});
    step(std::integral_constant<int, 3>{});
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = 4 * i + lane / 8, piece = lane % 8;
      const int64_t row = row0 + r, k = int64_t(tile) * blob::kDepth + 8 * piece;
      if (row < p.n && k < p.k) {
        *reinterpret_cast<uint4*>(to + row * p.k + k) = *reinterpret_cast<const uint4*>(&staged[warp][r][4 * piece]);
      }
    }
    __syncwarp();  // the stage is read
  }
}

//   grid  rows * n / kDenseThreads, rounded up     block  kDenseThreads     smem  none
// Rows m0 .. of y from their sums.
template <typename T>
__global__ __launch_bounds__(kDenseThreads) void finish_sums_kernel(const __grid_constant__ Problem p,
                                                                     const float* __restrict__ sums, int64_t m0,
                                                                     int64_t rows) {
  const int64_t at = int64_t(blockIdx.x) * kDenseThreads + threadIdx.x;
  if (at >= rows * p.n) return;
  const Global global = Global::of<T>(*p.global_scale);
  const Epilogue<T> put{static_cast<const T*>(p.bias), static_cast<T*>(p.y), p.m, p.n, global.rest, p.relu2};
  const int64_t row = at % p.n;
  put(m0 + at / p.n, row, finished(sums[at], marked(p, row)));
}

}  // namespace n3::nvfp4_linear_packed
