// Launch of causal_conv1d's kernel, for the operator and for mamba2_prefill.
#pragma once
#include "conv1d.h"
#include "conv1d_kernel.cuh"
#include "operands_cuda.h"

namespace n3::causal_conv1d {

// All but the grid.
inline Args args_of(const Params& p) {
  Args a{};
  a.x = mamba::view_of(p.x);
  a.taps = {mamba::view_of(p.taps.weight), mamba::view_of(p.taps.bias), p.taps.channels, p.taps.width, p.taps.silu};
  a.initial = mamba::view_of(p.initial), a.final = mamba::view_of(p.final);
  a.state_indices = mamba::view_of(p.state_indices), a.has_initial = mamba::view_of(p.has_initial);
  a.cu_seqlens = mamba::view_of(p.cu_seqlens);
  a.checkpoint_tokens = mamba::view_of(p.checkpoint_tokens);
  a.checkpoint_indices = mamba::view_of(p.checkpoint_indices);
  a.y = p.y;
  a.sequences = p.sequences, a.tokens = p.tokens, a.length = p.length, a.kept = p.kept, a.slots = p.slots;
  a.checkpoints = p.checkpoints;
  return a;
}

// On sm_90 and later, from x of 16 bits: y as mamba::Saturated, and checkpoints; final states are left to
// write_final_state(). Begins before the kernels before it end. Compiled once, in conv1d_cuda.cu.
void launch_mixed(const char* op, const Params& p, cudaStream_t stream);

}  // namespace n3::causal_conv1d
