// How moe_sort runs on a GPU: pure host arithmetic.
#pragma once
#include <algorithm>
#include <cstdint>

namespace n3::moe_sort {

constexpr int kThreads = 512;                // of the block that sorts, or adds up, alone
constexpr int kWarps = 4;                    // of a block that counts or places
constexpr int64_t kAlone = 1 << 14;          // slots that one block sorts
constexpr int64_t kTable = 46 * 1024 / 4;    // counters that it has room for, without asking for more than 48 KiB
constexpr int64_t kChunk = 512;              // slots of a warp, at least, where several blocks sort
constexpr int64_t kMostChunks = 1024;        // which one block adds up

// The slots are cut into chunks of one warp each; a table has a row of counters, one per group, for each chunk.
struct Plan {
  bool alone;  // one block, its table in shared memory; else three launches and a table in global memory
  int64_t chunks, size;  // size: slots of a chunk
};

// groups: the experts, and the skipped slots behind them.
inline Plan plan(int64_t slots, int64_t groups) {
  const int64_t room = std::min<int64_t>(kThreads / 32, kTable / groups);
  if (slots <= kAlone && room >= 4) {
    const int64_t chunks = std::clamp<int64_t>((slots + 31) / 32, 1, room);
    return {true, chunks, (slots + chunks - 1) / chunks};
  }
  const int64_t size = std::max(kChunk, (slots + kMostChunks - 1) / kMostChunks);
  return {false, std::max<int64_t>(1, (slots + size - 1) / size), size};
}

}  // namespace n3::moe_sort
