// How mamba2_decode runs on a GPU: pure host arithmetic.
#pragma once
#include <cstdint>

#include "ssm_update_plan.h"

namespace n3::mamba2 {

constexpr int kDecodeThreads = 256;
constexpr int64_t kDecodeShared = 96 * 1024;  // bytes; 99 KiB is the most of sm_120

struct DecodeSizes {
  int64_t batch, tokens, heads, groups, head_dim, d_state, group_size;
  bool vectors, tree;
};

// One launch, or the parts' three. Both give the same bits.
struct DecodePlan {
  bool fused;
  int64_t blocks;        // of the fused kernel: sequences times groups
  int64_t shared_bytes;
  int64_t width;         // of B and C in shared memory: the values of a row, and zeros
};

inline DecodePlan decode_plan(const DecodeSizes& s) {
  const ssm_update::Shape shape = ssm_update::shape(s.d_state, s.vectors);
  const int64_t heads = s.heads / s.groups, inner = heads * s.head_dim, width = shape.lanes * shape.groups * 4;
  const int64_t bytes = 4 * s.tokens * (2 * width + inner + 2 * heads);
  // A block streams the states of its group through one SM. Above 2^17 values (Super: 16 heads of 64 x 128, 512 KiB in
  // float32) that takes longer than two more launches, unless there are blocks for every SM. [estimate: to be measured]
  const bool balanced = inner * s.d_state <= 1 << 17 || s.batch * s.groups >= 128;
  const bool fits = shape.vectors && !s.tree && bytes <= kDecodeShared && inner % s.group_size == 0;
  return {fits && balanced, s.batch * s.groups, bytes, width};
}

}  // namespace n3::mamba2
