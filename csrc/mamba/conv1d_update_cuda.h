// Launch of causal_conv1d_update's kernel, for the operator and for mamba2_decode.
#pragma once
#include "conv1d.h"
#include "conv1d_update_kernel.cuh"
#include "operands_cuda.h"

namespace n3::causal_conv1d {

// Everything but y and the staged states.
inline UpdateArgs args_of(const UpdateParams& p) {
  UpdateArgs a{};
  a.x = mamba::view_of(p.x);
  a.taps = {mamba::view_of(p.taps.weight), mamba::view_of(p.taps.bias), p.taps.channels, p.taps.width, p.taps.silu};
  a.state = mamba::view_of(p.state);
  a.use = History(p.use);
  a.slots = {mamba::view_of(p.source), p.source_cols, mamba::Where(p.where), mamba::view_of(p.destination),
             mamba::view_of(p.num_accepted), mamba::view_of(p.num_tokens), mamba::view_of(p.parents), p.slots, p.batch,
             p.tokens};
  a.cache_seqlens = mamba::view_of(p.cache_seqlens);
  a.kept = p.kept, a.channel_blocks = update_channel_blocks(p.taps.channels);
  return a;
}

// Compiled once, in conv1d_update_cuda.cu.
void launch_update(const char* op, const UpdateArgs& a, cudaStream_t stream);

}  // namespace n3::causal_conv1d
