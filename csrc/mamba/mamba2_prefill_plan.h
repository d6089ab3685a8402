// How mamba2_prefill runs on sm_90: pure host arithmetic.
#pragma once
#include "conv1d_plan.h"
#include "gated_norm_plan.h"

namespace n3::mamba2 {

struct PrefillSizes {
  int64_t tokens, sequences, inner, channels, kept;  // inner: of y; channels, kept: of the convolution and its state
  int64_t group_size;
};

// Three launches: convolution, scan, and finish_kernel, which has blocks for groups of the norm and, behind them, for
// final states of the convolution. The gate belongs to the last, which waits for memory and has arithmetic to spare,
// where the scan has none.
struct PrefillPlan {
  int threads;  // of a group of the norm
  int64_t groups, norm_blocks, channel_blocks, blocks;  // channel_blocks: of one final state
};

inline PrefillPlan prefill_plan(const PrefillSizes& s) {
  const int64_t groups = s.inner ? s.inner / s.group_size : 0;
  const gated_norm::Plan norm = gated_norm::plan(s.tokens, groups, s.group_size);
  const int64_t channel_blocks = causal_conv1d::ceil_div(s.channels, gated_norm::block_threads(norm.threads));
  const int64_t states = s.kept ? s.sequences : 0;
  return {norm.threads, groups, norm.blocks, channel_blocks, norm.blocks + states * channel_blocks};
}

}  // namespace n3::mamba2
