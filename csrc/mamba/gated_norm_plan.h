// How gated_rms_norm runs on a GPU: pure host arithmetic.
#pragma once
#include <cstdint>

namespace n3::gated_norm {

constexpr int kBlockThreads = 128;  // of a block, or those of one group where they are more
constexpr int kChunk = 8;           // neighbouring elements of a thread: 16 bytes of a 16-bit row

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

}  // namespace n3::gated_norm
