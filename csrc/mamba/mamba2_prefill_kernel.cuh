// mamba2_prefill: the last of its three launches, behind causal_conv1d's and ssd_scan's kernels.
#pragma once
#include "conv1d_kernel.cuh"
#include "gated_norm_kernel.cuh"
#include "mamba2_prefill_plan.h"

namespace n3::mamba2 {

struct FinishArgs {
  gated_norm::Args norm;         // x: the scan's y, Saturated, in whose place is y; weight null: no norm
  int64_t z_sequence, z_token;   // strides of z, whose channels are norm.z.strides[1] apart
  causal_conv1d::Args conv;      // channel_blocks: of the blocks behind those of the norm
  uint32_t norm_blocks;
};

// y = x silu(z), where there is no norm.
template <typename T, int kThreads, bool kVectors>
N3_DEVICE void gate_group(const gated_norm::Args& a, const gated_norm::Group& g, int lane) {
  using gated_norm::kChunk;
  float h[kChunk], gate[kChunk];
  for (int64_t i = g.begin + lane * kChunk; i < g.end; i += kThreads * kChunk) {
    gated_norm::load_gated<mamba::Saturated, T, kVectors>(a, g, i, h, gate);
    gated_norm::store_chunk<T, kVectors>(static_cast<T*>(a.y) + g.y + i, g.end - i, h);
  }
}

//   grid  norm_blocks: groups of the norm, as of gated_rms_norm; then sequences * conv.channel_blocks: final states of
//         the convolution, which wait until nobody reads the slots     block block_threads(kThreads)     smem  as there
// What is padding is zero already, and stays so: its z may be NaN.
template <typename T, int kThreads, bool kVectors>
__global__ __launch_bounds__(gated_norm::block_threads(kThreads), !kVectors ? 1 : kThreads > 128 ? 2 : 8)
void finish_kernel(const __grid_constant__ FinishArgs a) {
  hopper::wait_for_previous();
  if (blockIdx.x >= a.norm_blocks) {
    return causal_conv1d::write_final_state<T, gated_norm::block_threads(kThreads)>(a.conv, blockIdx.x - a.norm_blocks);
  }
  gated_norm::Group g{};  // of padding, and behind the last: empty
  int64_t row, begin;
  if (gated_norm::group_of<kThreads>(a.norm, blockIdx.x, row, begin)) {
    const causal_conv1d::Span span = causal_conv1d::span_at(a.conv, row);
    if (causal_conv1d::slot_of(a.conv, span.s) >= 0) {
      g.x = g.y = row * a.norm.groups * a.norm.group_size;
      g.z = a.conv.cu_seqlens.data ? row * a.z_token : span.s * a.z_sequence + (row - span.begin) * a.z_token;
      g.begin = begin, g.end = begin + a.norm.group_size;
    }
  }
  const int lane = threadIdx.x % kThreads;
  if (a.norm.weight.data) {
    gated_norm::normalise_group<mamba::Saturated, T, kThreads, kVectors>(a.norm, g, lane);
  } else {
    gate_group<T, kThreads, kVectors>(a.norm, g, lane);
  }
}

}  // namespace n3::mamba2
