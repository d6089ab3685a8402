// How gated_rms_norm runs on a GPU: pure host arithmetic.
#pragma once
#include <cstdint>

#include "partial_sums_plan.h"

namespace n3::gated_norm {

constexpr int kBlockThreads = 128;  // of a block, or those of one group where they are more
constexpr int kChunk = 8;           // neighbouring elements of a thread: 16 bytes of a 16-bit row

constexpr int64_t kMostGroups = (int64_t(1) << 32) - 4;  // numbered in 32 bits, those behind the last in its block too

struct Plan {
  int threads;      // of one group: 32, 128 or 512. Groups of one size are summed in one order, whatever the batch
  int64_t blocks;
};

constexpr int block_threads(int threads) { return threads < kBlockThreads ? kBlockThreads : threads; }

inline Plan plan(int64_t rows, int64_t groups, int64_t group_size) {
  const int threads = group_size <= 1024 ? 32 : group_size <= 4096 ? 128 : 512;
  const int64_t per_block = block_threads(threads) / threads;
  return {threads, (rows * groups + per_block - 1) / per_block};
}

struct BackwardPlan {
  int threads;    // of a block, which has one group at a time: 64, 256 or 512
  bool held;      // its sums for the weight fit in shared memory
  int shared;     // bytes, dynamic
  mamba::Pieces pieces;
  int64_t blocks;
};

inline BackwardPlan backward_plan(int64_t rows, int64_t groups, int64_t group_size) {
  const int threads = group_size <= 512 ? 64 : group_size <= 4096 ? 256 : 512;
  const int64_t step = int64_t(threads) * kChunk, bytes = (group_size + step - 1) / step * step * 4;
  const bool held = bytes <= 48 * 1024;
  const mamba::Pieces pieces = mamba::pieces(rows);
  return {threads, held, held ? int(bytes) : 0, pieces, pieces.count * groups};
}

}  // namespace n3::gated_norm
