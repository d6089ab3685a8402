// The sum over a token's slots in moe_experts on sm_90, by the blocks that multiply.
#pragma once
#include "experts_slots_sm90.cuh"

namespace n3::moe_experts::sm90 {

constexpr int kLoaders = 3;      // warps that fetch inputs, and what the copy engine does not
constexpr int kComputing = 256;  // threads

// Zeros for the tokens none of whose slots count: nobody else writes them. By the warps that load.
N3_DEVICE void clear_rows(const Call& p, int32_t slots, int warp) {
  const int lane = threadIdx.x % 32;
  for (int32_t token = blockIdx.x * kLoaders + warp; token < p.tokens; token += gridDim.x * kLoaders) {
    bool counts = false;
    for (int32_t slot = token * p.top_k + lane; slot < (token + 1) * p.top_k; slot += 32) {
      counts |= slot < slots && is_local(p, p.ids[slot]);
    }
    if (__ballot_sync(0xffffffffu, counts)) continue;
    for (int32_t column = 4 * lane; column < p.width; column += 128) {
      store_four(p.y, p.float_y, int64_t(token) * p.width + column, make_float4(0.f, 0.f, 0.f, 0.f));
    }
  }
}

// The ranges' rows of a slot become one, r ascending, in the place of the first.
template <int kTokens>
N3_DEVICE void add_ranges(const Call& p, const List<kTokens>& list) {
  const int32_t pieces = p.width / 4, parts = rows_per_slot(p.work);
  for (int32_t i = threadIdx.x; i < list.count * pieces; i += kComputing) {
    auto* row = reinterpret_cast<float4*>(p.rows + int64_t(list.slot(i / pieces)) * parts * p.width);
    row += i % pieces;
    float4 sum = *row;
#pragma unroll 5
    for (int32_t r = 1; r < parts; ++r) {
      const float4 v = row[int64_t(r) * pieces];
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    *row = sum;
  }
}

// y[t] = sum_j weights[t, j] * rows[t, j], j ascending, rounded once, of `count` tokens. Rows of skipped slots are not
// read and add 0, whatever the weight.
N3_DEVICE void add_slots(const Call& p, const int32_t* tokens, int32_t count) {
  constexpr int kAtOnce = 8;  // loads under way
  const int32_t pieces = p.width / 4, parts = rows_per_slot(p.work);
  for (int32_t i = threadIdx.x; i < count * pieces; i += kComputing) {
    const int32_t token = tokens[i / pieces], first = token * p.top_k, column = i % pieces * 4;
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int32_t from = 0; from < p.top_k; from += kAtOnce) {
      float4 row[kAtOnce];
      float weight[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        const int64_t slot = first + from + u;
        const bool counts = from + u < p.top_k && is_local(p, p.ids[slot]);
        weight[u] = counts ? p.weights[slot] : 0.f;
        row[u] = counts ? *reinterpret_cast<const float4*>(p.rows + slot * parts * p.width + column)
                        : make_float4(0.f, 0.f, 0.f, 0.f);
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        sum.x += weight[u] * row[u].x, sum.y += weight[u] * row[u].y;
        sum.z += weight[u] * row[u].z, sum.w += weight[u] * row[u].w;
      }
    }
    store_four(p.y, p.float_y, int64_t(token) * p.width + column, sum);
  }
}

// Behind an item whose rows this block has stored. The block whose range is the last of a tile to arrive adds up the
// tile's ranges; then, the block whose slot is the last of a token to arrive its slots. Which block that is changes
// nothing but the time: sums are in the order of ranges and slots. By the threads that compute.
struct Meeting {
  int32_t last, count, tokens[32];
};

template <int kTokens>
N3_DEVICE void add_up(const Call& p, const List<kTokens>& list, Meeting& meeting) {
  const int32_t parts = rows_per_slot(p.work);
  hopper::sync_threads<kComputing>(1);  // all rows are stored; nobody reads the last meeting any more
  if (parts > 1) {
    if (threadIdx.x == 0) meeting.last = hopper::is_last(p.counters + p.tokens + list.tile, uint32_t(parts));
    hopper::sync_threads<kComputing>(1);
    if (!meeting.last) return;
    add_ranges(p, list);
    hopper::sync_threads<kComputing>(1);
  }
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    const int32_t token = lane < list.count ? list.slot(lane) / p.top_k : 0;
    const bool last = lane < list.count && hopper::is_last(p.counters + token, list.others(lane) + 1);
    const uint32_t all = __ballot_sync(0xffffffffu, last);
    if (last) meeting.tokens[__popc(all & ((1u << lane) - 1))] = token;
    if (lane == 0) meeting.count = __popc(all);
  }
  hopper::sync_threads<kComputing>(1);
  add_slots(p, meeting.tokens, meeting.count);
}

}  // namespace n3::moe_experts::sm90
