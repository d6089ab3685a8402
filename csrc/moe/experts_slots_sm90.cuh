// Whose slots are whose: in moe_experts on sm_90 each block counts the slots of all experts and lists those of its own
// items, so that no launch has to sort them before.
#pragma once
#include "../common/hopper.cuh"
#include "items.cuh"

namespace n3::moe_experts::sm90 {

struct Call {
  Work work;
  const device::BF16* x;        // [tokens, width], 16-byte aligned
  const int32_t* ids;           // [tokens, top_k]
  const float* weights;         // [tokens, top_k]
  const int32_t* valid_tokens;  // [1] or null
  float* rows;                  // [slots, rows_per_slot, width]
  uint32_t* counters;           // of the tokens, then of the tiles: zeros, before and after
  void* y;                      // [tokens, width], bfloat16 or float32
  int32_t first_expert, tokens, top_k, width, inner;
  int64_t first_token;  // of the batch that valid_tokens is of
  bool gelu;            // of the gated activations, not SiLU
  bool float_y;
};

// Slots that may count, the first ones: those of the rows before valid_tokens.
N3_DEVICE int32_t slots_of(const Call& p) {
  const int64_t valid = p.valid_tokens ? *p.valid_tokens - p.first_token : p.tokens;
  return (valid < 0 ? 0 : valid < p.tokens ? int32_t(valid) : p.tokens) * p.top_k;
}

N3_DEVICE bool is_local(const Call& p, int32_t id) {
  return id >= p.first_expert && id - p.first_expert < p.work.experts;
}

// In shared memory: the tiles of the experts before each, and the slots that may count.
struct Tiles {
  int32_t before[kMostExperts + 1], slots, unused[2];
};

// Fills `tiles`, where before[] holds zeros. By all threads, with a barrier at the end.
N3_DEVICE void count_slots(const Call& p, Tiles& tiles, int32_t* totals, int tokens) {
  constexpr int kAtOnce = 8;  // loads under way
  int32_t* before = tiles.before;
  const int32_t slots = slots_of(p);
  if (threadIdx.x == 0) tiles.slots = slots;
  for (int32_t from = threadIdx.x; from < slots; from += kAtOnce * kThreads) {
    int32_t ids[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) ids[i] = from + i * kThreads < slots ? p.ids[from + i * kThreads] : -1;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (is_local(p, ids[i])) atomicAdd(before + (ids[i] - p.first_expert), 1);
    }
  }
  __syncthreads();
  count_tiles(p.work.experts, before, totals, [&](int32_t e) { return tiles_in(before[e], tokens); });
}

// An item in shared memory, for the threads that compute: its slots, ascending, each with the number of its token's
// other slots that count above it (both are below 2^16, for a launch has no more); how many; and what else they need.
template <int kTokens>
struct List {
  uint32_t entries[kTokens];
  int32_t count, tile, first_range;  // the tile among all
  float up_rest, down_rest;          // of the expert
  int32_t unused[3];

  N3_DEVICE int32_t slot(int n) const { return int32_t(entries[n] & 0xffff); }
  N3_DEVICE uint32_t others(int n) const { return entries[n] >> 16; }
};

// By a warp: the slots of an expert from its first-th on.
template <int kTokens>
N3_DEVICE void list_slots(const Call& p, int32_t slots, int32_t expert, int32_t first, List<kTokens>& list) {
  constexpr int kAtOnce = 8;  // loads under way
  const int lane = threadIdx.x % 32;
  const int32_t id = expert + p.first_expert;  // that of some slot
  int32_t rank = -first;                       // of the next one, in the list
  for (int32_t from = lane; from - lane < slots && rank < kTokens; from += 32 * kAtOnce) {
    int32_t ids[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) ids[i] = from + 32 * i < slots ? p.ids[from + 32 * i] : -1;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const uint32_t all = __ballot_sync(0xffffffffu, ids[i] == id);
      const int32_t at = rank + __popc(all & ((1u << lane) - 1));
      if (ids[i] == id && at >= 0 && at < kTokens) list.entries[at] = uint32_t(from + 32 * i);
      rank += __popc(all);
    }
  }
  const int32_t count = rank < kTokens ? rank : kTokens;
  __syncwarp();
  uint32_t mine = 0;
  for (int32_t from = 0; from < count; from += 4) {
    uint32_t slots_of_token[4] = {};
    for (int32_t j = lane; j - lane < p.top_k; j += 32) {
      bool counts[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int32_t first = from + i < count ? list.slot(from + i) / p.top_k * p.top_k : 0;
        counts[i] = j < p.top_k && is_local(p, p.ids[first + j]);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) slots_of_token[i] += __popc(__ballot_sync(0xffffffffu, counts[i]));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (lane == from + i) mine = slots_of_token[i];
    }
  }
  if (lane < count) list.entries[lane] |= (mine - 1) << 16;
  if (lane == 0) list.count = count;
}

}  // namespace n3::moe_experts::sm90
