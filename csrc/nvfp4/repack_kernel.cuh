// nvfp4_repack on a GPU, once per checkpoint: simple, not fast.
#pragma once
#include "../common/device.cuh"
#include "repack_plan.h"

namespace n3::nvfp4_repack {

//   grid  row_tiles(n)     block  kThreads     smem  none
__global__ __launch_bounds__(kThreads) void repack_kernel(Weights w, uint8_t* __restrict__ blob) {
  const int64_t tiles = depth_tiles(w.k), row_tile = blockIdx.x;
  uint8_t* to = blob + row_tile * row_bytes(w.k);
  for (int64_t i = threadIdx.x; i < tiles * 128; i += kThreads) {
    const int64_t tile = i / 128;
    const int word = int(i % 128);
    *reinterpret_cast<uint32_t*>(to + tile * kTile + 4 * word) = packed_word(w, row_tile, tile, word);
  }
  for (int64_t i = threadIdx.x; i < tiles * kScales; i += kThreads) {
    to[i / kScales * kTile + kCodes + i % kScales] = packed_scale(w, row_tile, i / kScales, int(i % kScales));
  }
  uint8_t* marks = to + tiles * kTile;
  if (threadIdx.x >= kRows && threadIdx.x < kMarks) marks[threadIdx.x] = 0;
  const int lane = threadIdx.x % 32;
  for (int r = threadIdx.x / 32; r < kRows; r += kThreads / 32) {
    const int64_t row = row_tile * kRows + r, blocks = row < w.n ? w.k / 16 : 0;
    uint32_t nan = 0;
    for (int64_t b = lane; b < blocks; b += 32) nan |= pack_scale(w.block_scale[row * blocks + b]) == kNaN;
    for (int by = 16; by; by /= 2) nan |= __shfl_xor_sync(0xffffffffu, nan, by);
    if (lane == 0) marks[r] = uint8_t(nan);
  }
}

}  // namespace n3::nvfp4_repack
