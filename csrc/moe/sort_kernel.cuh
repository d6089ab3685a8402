// moe_sort, a stable counting sort: each warp counts the groups of its chunk of slots; one block adds the counts up;
// each warp puts its slots to their places. Nothing depends on the order in which threads run.
#pragma once
#include "../common/scan.cuh"
#include "sort_plan.h"

namespace n3::moe_sort {

struct Args {
  const int32_t* ids;  // [slots]
  int32_t* order;      // [slots]
  int32_t* offsets;    // [experts + 1]
  int32_t* active;     // [experts]
  int32_t* num_active;
  int32_t* table;      // [chunks, experts + 1]; null: in shared memory
  int64_t slots, first;
  int32_t experts;
  int32_t chunks, size;
};

// The group of a slot: its local expert, or behind them.
N3_DEVICE uint32_t group_of(const Args& a, int64_t slot) {
  const int64_t local = int64_t(a.ids[slot]) - a.first;
  return uint32_t(local >= 0 && local < a.experts ? local : a.experts);
}

// Adds up the groups of a chunk's slots in `row`, 32 slots at a time, and calls f(slot, group, how many slots of the
// group came before it).
template <typename F>
N3_DEVICE void over_chunk(const Args& a, int64_t chunk, int32_t* row, F f) {
  const int lane = threadIdx.x % 32;
  const int64_t begin = chunk * a.size, end = begin + a.size < a.slots ? begin + a.size : a.slots;
  for (int64_t i = begin; i < end; i += 32) {
    const int64_t slot = i + lane;
    const bool inside = slot < end;
    const uint32_t group = inside ? group_of(a, slot) : 0xffffffffu;
    const uint32_t same = __match_any_sync(0xffffffffu, group);
    const int before = __popc(same & ((1u << lane) - 1)), all = __popc(same);
    int32_t sum = 0;
    if (inside) sum = row[group], f(slot, group, sum + before);
    __syncwarp();  // all have read
    if (inside && before == 0) row[group] = sum + all;
    __syncwarp();
  }
}

N3_DEVICE void count_chunk(const Args& a, int64_t chunk, int32_t* row) {
  for (int32_t g = threadIdx.x % 32; g <= a.experts; g += 32) row[g] = 0;
  __syncwarp();
  over_chunk(a, chunk, row, [](int64_t, uint32_t, int32_t) {});
}

// The row holds how many slots of each group are in the chunks before.
N3_DEVICE void place_chunk(const Args& a, int64_t chunk, int32_t* row) {
  over_chunk(a, chunk, row, [&](int64_t slot, uint32_t group, int32_t before) {
    a.order[a.offsets[group] + before] = int32_t(slot);
  });
}

// Turns the counts of each chunk into those of the chunks before it, and writes all but the order. One block.
N3_DEVICE void add_up(const Args& a, int32_t* table) {
  constexpr int kAtOnce = 8;  // loads under way
  __shared__ int32_t of_warp[kThreads / 32];
  const int64_t groups = int64_t(a.experts) + 1;
  int32_t slots = 0, experts = 0;  // before these groups
  for (int64_t first = 0; first < groups; first += kThreads) {
    const int64_t g = first + threadIdx.x;
    int32_t count = 0;
    for (int32_t c = 0; g < groups && c < a.chunks; c += kAtOnce) {
      int32_t of_chunk[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) of_chunk[i] = c + i < a.chunks ? table[(c + i) * groups + g] : 0;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (c + i < a.chunks) table[(c + i) * groups + g] = count;
        count += of_chunk[i];
      }
    }
    const bool busy = g < a.experts && count > 0;
    int32_t all, all_busy;
    const int32_t before = device::block_before<kThreads>(count, of_warp, all);
    const int32_t busy_before = device::block_before<kThreads>(busy, of_warp, all_busy);
    if (g < groups) a.offsets[g] = slots + before;  // the last: where the skipped slots begin
    if (busy) a.active[experts + busy_before] = int32_t(g);
    slots += all, experts += all_busy;
  }
  for (int32_t i = experts + int32_t(threadIdx.x); i < a.experts; i += kThreads) a.active[i] = -1;
  if (threadIdx.x == 0) *a.num_active = experts;
}

//   grid  1     block kThreads     smem  chunks * (experts + 1) words
__global__ __launch_bounds__(kThreads) void alone_kernel(const Args a) {
#if defined(__CUDACC__)
  extern __shared__ int32_t table[];
#else
  int32_t* const table = reinterpret_cast<int32_t*>(::emulator::dynamic_shared);
#endif
  const int32_t chunk = threadIdx.x / 32;
  int32_t* row = table + chunk * (int64_t(a.experts) + 1);
  if (chunk < a.chunks) count_chunk(a, chunk, row);
  __syncthreads();
  add_up(a, table);
  __syncthreads();
  if (chunk < a.chunks) place_chunk(a, chunk, row);
}

//   grid  chunks / kWarps, rounded up     block 32 * kWarps
__global__ __launch_bounds__(32 * kWarps) void count_kernel(const Args a) {
  const int64_t chunk = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (chunk < a.chunks) count_chunk(a, chunk, a.table + chunk * (int64_t(a.experts) + 1));
}

//   grid  1     block kThreads
__global__ __launch_bounds__(kThreads) void add_kernel(const Args a) { add_up(a, a.table); }

// Grid and block of count_kernel.
__global__ __launch_bounds__(32 * kWarps) void place_kernel(const Args a) {
  const int64_t chunk = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (chunk < a.chunks) place_chunk(a, chunk, a.table + chunk * (int64_t(a.experts) + 1));
}

}  // namespace n3::moe_sort
