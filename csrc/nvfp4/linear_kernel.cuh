// nvfp4_linear: y = act(x W^T * global_scale + bias), W = e2m1 * e4m3 decoded exactly, sums in float32.
//
// Operands: x [m, k], q [n, k / 2], block_scale [n, k / 16], row-major, 16-byte aligned at their start; k % 16 == 0.
// A power of two of the global scale goes into the weights (split_global), the rest into the result.
#pragma once
#include <type_traits>

#include "decode_kernel.cuh"
#include "linear_epilogue.cuh"
#include "linear_plan.h"

namespace n3::nvfp4_linear {

struct GlobalScale {
  float power;  // of two, into the weights
  float rest;   // for the result
};

// Without it the sum of huge activations overflows although the scaled result would not. The tensor core kernel for
// float16, whose operands have not the range, does without: there x is at most 65504.
N3_DEVICE GlobalScale split_global(float global, bool fold) {
  if (!fold) return {1.f, global};
  int e = int(float_bits(global) >> 23 & 0xff) - 127;
  e = e < -100 ? -100 : e > 100 ? 100 : e;
  return {bits_float(uint32_t(127 + e) << 23), global * bits_float(uint32_t(127 - e) << 23)};
}

// ---------------------------------------------------------------- few rows of x

//   grid  plan().blocks     block 32 * kRowsWarps     smem  none
// A warp sums kRows rows of W for kTokens rows of x. Lane l takes scale blocks l, l + 32, ... of each row: a warp reads
// 256 neighbouring bytes of codes and 32 of scales. One fused multiply-add per product, k in order within a lane, then
// the lanes in the order of warp_sum: the bits depend on nothing but the two rows. 3 blocks per SM: left to itself
// ptxas aims at 96 registers, and spills.
template <typename T, int kTokens, int kRows>
__global__ __launch_bounds__(32 * kRowsWarps, 3) void rows_kernel(
    const T* __restrict__ x, const uint8_t* __restrict__ q, const uint8_t* __restrict__ block_scale,
    const float* __restrict__ global_scale, const T* __restrict__ bias, T* __restrict__ y, int64_t m, int64_t n,
    int64_t ks, bool relu2) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row0 = (int64_t(blockIdx.x) * kRowsWarps + warp) * kRows;
  if (row0 >= n) return;
  const GlobalScale global = split_global(*global_scale, true);

  float sum[kTokens][kRows] = {};
  for (int64_t b = lane; b < ks; b += 32) {
    uint2 codes[kRows];
    float factor[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t from = (row0 + r < n ? row0 + r : n - 1) * ks + b;  // a row past the end is the last, not stored
      codes[r] = reinterpret_cast<const uint2*>(q)[from];
      factor[r] = e4m3_to_float(block_scale[from]) * (global.power * nvfp4::kPairFactor);
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      float v[16];
      device::load16(x + ((t < m ? t : m - 1) * ks + b) * 16, v);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float low, high;
          nvfp4::e2m1_pair((i < 4 ? codes[r].x : codes[r].y) >> 8 * (i % 4) & 0xff, low, high);
          sum[t][r] = fmaf(low * factor[r], v[2 * i], sum[t][r]);
          sum[t][r] = fmaf(high * factor[r], v[2 * i + 1], sum[t][r]);
        }
      }
    }
  }

  const Epilogue<T> store{bias, y, m, n, global.rest, relu2};
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float total = device::warp_sum(sum[t][r]);
      if (lane == 0) store(t, row0 + r, total);
    }
  }
}

// ---------------------------------------------------------------- tensor cores

// One stage of shared memory. Rows of x are 8 elements longer than the tile: with a stride of 144 bytes the eight lanes
// that read 16 bytes each at once (rows g, g + 1, threads t = 0..3 of the quad, 32 bytes apart) touch all 32 banks.
template <typename T, typename Tile>
struct Stage {
  T x[Tile::kTileM][kTileK + 8];
  uint8_t q[Tile::kTileN][kTileK / 2];
};

// Starts the copies of one stage; what lies outside x or W becomes zero, and zero codes decode to 0.
template <typename T, typename Tile>
N3_DEVICE void load_stage(Stage<T, Tile>& to, const T* x, const uint8_t* q, int64_t m0, int64_t n0, int64_t k0,
                          int64_t m, int64_t n, int64_t k) {
  constexpr int kChunksX = kTileK / 8, kChunksQ = kTileK / 16;  // of 16 and 8 bytes
  for (int i = threadIdx.x; i < Tile::kTileM * kChunksX; i += Tile::kThreads) {
    const int row = i / kChunksX, col = i % kChunksX * 8;
    const bool valid = m0 + row < m && k0 + col < k;
    device::copy_async<16>(&to.x[row][col], valid ? x + (m0 + row) * k + k0 + col : x, valid);
  }
  for (int i = threadIdx.x; i < Tile::kTileN * kChunksQ; i += Tile::kThreads) {
    const int row = i / kChunksQ, byte = i % kChunksQ * 8;
    const bool valid = n0 + row < n && k0 + 2 * byte < k;
    device::copy_async<8>(&to.q[row][byte], valid ? q + ((n0 + row) * k + k0) / 2 + byte : q, valid);
  }
}

// The two operand registers of one step from 8 bytes of codes: b[0] elements 0, 1 and b[1] elements 2, 3 of slot_k.
template <typename T>
N3_DEVICE void decode_step(uint2 codes, int step, float factor, uint32_t (&b)[2]) {
  const uint32_t bytes = (step < 2 ? codes.x : codes.y) >> 16 * (step % 2);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float low, high;
    nvfp4::e2m1_pair(bytes >> 8 * i & 0xff, low, high);
    b[i] = device::pack<T>(low * factor, high * factor);  // exact: at most 6 significant bits
  }
}

// The scale block of thread t of a quad in the tile at k0, of rows n0 + 8 f + g: bytes, fetched a tile ahead.
template <typename Tile>
N3_DEVICE void load_scales(uint8_t (&to)[Tile::kFragmentsN], const uint8_t* block_scale, int64_t n0, int64_t block,
                           int64_t n, int64_t ks) {
#pragma unroll
  for (int f = 0; f < Tile::kFragmentsN; ++f) {
    const int64_t row = n0 + 8 * f;
    to[f] = row < n && block < ks ? block_scale[row * ks + block] : uint8_t(0);
  }
}

//   grid  plan().blocks: tiles of y, m first, so that the blocks of a wave share weights in L2
//   block Tile::kThreads     smem  Tile::kStages stages, static
// x is operand a, the weights, decoded in registers, operand b of m16n8k16. A thread of a quad holds 16 neighbouring k
// of a tile (slot_k): one scale, one 8-byte read of codes, two 16-byte reads of x per row, and no ldmatrix.
template <typename T, typename Tile>
__global__ __launch_bounds__(Tile::kThreads) void tensor_kernel(const T* __restrict__ x, const uint8_t* __restrict__ q,
                                                                const uint8_t* __restrict__ block_scale,
                                                                const float* __restrict__ global_scale,
                                                                const T* __restrict__ bias, T* __restrict__ y,
                                                                int64_t m, int64_t n, int64_t ks, bool relu2) {
  constexpr int kStages = Tile::kStages, kFM = Tile::kFragmentsM, kFN = Tile::kFragmentsN;
  alignas(16) __shared__ Stage<T, Tile> stages[kStages];
  const int64_t tiles_m = tiles_of(m, Tile::kTileM), k = ks * 16;
  const int64_t m0 = int64_t(blockIdx.x) % tiles_m * Tile::kTileM, n0 = int64_t(blockIdx.x) / tiles_m * Tile::kTileN;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int warp_m = warp % Tile::kWarpsM * kFM * 16, warp_n = warp / Tile::kWarpsM * kFN * 8;
  const GlobalScale global = split_global(*global_scale, std::is_same_v<T, device::BF16>);
  const float factor = global.power * nvfp4::kPairFactor;
  const int steps = int((k + kTileK - 1) / kTileK);

#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) load_stage(stages[s], x, q, m0, n0, int64_t(s) * kTileK, m, n, k);
    device::commit_copies();  // also when empty: wait_copies counts groups
  }
  uint8_t scales[kFN];
  load_scales<Tile>(scales, block_scale, n0 + warp_n + g, t, n, ks);

  float acc[kFM][kFN][4] = {};
  for (int s = 0; s < steps; ++s) {
    device::wait_copies<kStages - 2>();
    __syncthreads();  // everybody's copies of stage s have landed, and everybody has left stage s - 1
    if (s + kStages - 1 < steps) {
      load_stage(stages[(s + kStages - 1) % kStages], x, q, m0, n0, int64_t(s + kStages - 1) * kTileK, m, n, k);
    }
    device::commit_copies();
    float scale[kFN];
#pragma unroll
    for (int f = 0; f < kFN; ++f) scale[f] = e4m3_to_float(scales[f]) * factor;
    load_scales<Tile>(scales, block_scale, n0 + warp_n + g, int64_t(s + 1) * 4 + t, n, ks);

    const Stage<T, Tile>& stage = stages[s % kStages];
    uint2 codes[kFN];
#pragma unroll
    for (int f = 0; f < kFN; ++f) {
      codes[f] = *reinterpret_cast<const uint2*>(&stage.q[warp_n + 8 * f + g][slot_k(t, 0, 0) / 2]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // of the thread's 16 k: two steps out of one 16-byte read per row
      uint4 rows[kFM][2];
#pragma unroll
      for (int f = 0; f < kFM; ++f) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const T* from = &stage.x[warp_m + 16 * f + 8 * r + g][slot_k(t, 2 * half, 0)];
          rows[f][r] = *reinterpret_cast<const uint4*>(from);
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int fn = 0; fn < kFN; ++fn) {
          uint32_t b[2];
          decode_step<T>(codes[fn], 2 * half + j, scale[fn], b);
#pragma unroll
          for (int fm = 0; fm < kFM; ++fm) {
            const uint4 top = rows[fm][0], bottom = rows[fm][1];
            const uint32_t a[4] = {j ? top.z : top.x, j ? bottom.z : bottom.x, j ? top.w : top.y,
                                   j ? bottom.w : bottom.y};
            device::mma_m16n8k16<T>(acc[fm][fn], a, b);
          }
        }
      }
    }
  }

  const Epilogue<T> store{bias, y, m, n, global.rest, relu2};
#pragma unroll
  for (int fm = 0; fm < kFM; ++fm) {
#pragma unroll
    for (int fn = 0; fn < kFN; ++fn) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        store(m0 + warp_m + 16 * fm + g + i / 2 * 8, n0 + warp_n + 8 * fn + 2 * t + i % 2, acc[fm][fn][i]);
      }
    }
  }
}

// ---------------------------------------------------------------- float32 x

//   grid  plan().blocks: tiles of y, m first     block 256 = 16 x 16 threads, 4 x 4 outputs each     smem  8.7 KB
// One scale block of k at a time. Sums of 64 products join the total: in one chain over k = 2688 the roundings of the
// total add up to a relative 9e-7, in two levels to 2e-7. 2 blocks per SM: left to itself ptxas aims at 64 registers on
// some architectures, and spills.
__global__ __launch_bounds__(256, 2) void fma_kernel(const float* __restrict__ x, const uint8_t* __restrict__ q,
                                                  const uint8_t* __restrict__ block_scale,
                                                  const float* __restrict__ global_scale,
                                                  const float* __restrict__ bias, float* __restrict__ y, int64_t m,
                                                  int64_t n, int64_t ks, bool relu2) {
  alignas(16) __shared__ float xs[16][kFmaTile + 4], ws[16][kFmaTile + 4];  // [k][row]; + 4: rows start in other banks
  const int64_t tiles_m = tiles_of(m, kFmaTile);
  const int64_t m0 = int64_t(blockIdx.x) % tiles_m * kFmaTile, n0 = int64_t(blockIdx.x) / tiles_m * kFmaTile;
  const int row = threadIdx.x / 4, part = threadIdx.x % 4;  // what a thread loads: 4 neighbouring k of one row
  const int ty = threadIdx.x / 16 * 4, tx = threadIdx.x % 16 * 4;
  const GlobalScale global = split_global(*global_scale, true);

  float total[4][4] = {}, sum[4][4] = {};
  for (int64_t b = 0; b < ks; ++b) {
    float4 xv = make_float4(0.f, 0.f, 0.f, 0.f);
    if (m0 + row < m) xv = reinterpret_cast<const float4*>(x)[((m0 + row) * ks + b) * 4 + part];
    uint32_t codes = 0;
    float factor = 0.f;
    if (n0 + row < n) {
      const int64_t from = (n0 + row) * ks + b;
      codes = reinterpret_cast<const uint16_t*>(q)[from * 4 + part];
      factor = e4m3_to_float(block_scale[from]) * (global.power * nvfp4::kPairFactor);
    }
    float w[4];
    nvfp4::e2m1_pair(codes & 0xff, w[0], w[1]);
    nvfp4::e2m1_pair(codes >> 8, w[2], w[3]);
    __syncthreads();  // everybody has read the last block
    const float xk[4] = {xv.x, xv.y, xv.z, xv.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      xs[part * 4 + i][row] = xk[i];
      ws[part * 4 + i][row] = w[i] * factor;
    }
    __syncthreads();
#pragma unroll
    for (int kk = 0; kk < 16; ++kk) {
      const float4 xf = *reinterpret_cast<const float4*>(&xs[kk][ty]);
      const float4 wf = *reinterpret_cast<const float4*>(&ws[kk][tx]);
      const float xr[4] = {xf.x, xf.y, xf.z, xf.w}, wr[4] = {wf.x, wf.y, wf.z, wf.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(xr[i], wr[j], sum[i][j]);
      }
    }
    if (b % 4 == 3 || b + 1 == ks) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          total[i][j] += sum[i][j];
          sum[i][j] = 0.f;
        }
      }
    }
  }

  const Epilogue<float> store{bias, y, m, n, global.rest, relu2};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) store(m0 + ty + i, n0 + tx + j, total[i][j]);
  }
}

}  // namespace n3::nvfp4_linear
