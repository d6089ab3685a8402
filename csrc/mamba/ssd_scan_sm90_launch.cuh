// Launch of ssd_scan's sm_90 kernel, for what instantiates it.
#pragma once
#include <type_traits>

#include "../common/launch.h"
#include "../common/tensor_map.h"
#include "operands_cuda.h"
#include "ssd_scan_sm90.h"
#include "ssd_scan_sm90_kernel.cuh"

namespace n3::ssd_scan {

static_assert(kChunk == sm90::kTokens);

// [sequences, tokens, middle, inner] in boxes of 64 tokens and `columns` of the inner dimension.
inline CUtensorMap map_of(const char* op, const Operand& o, int64_t inner, int64_t middle, int64_t tokens,
                          int64_t sequences, int columns) {
  return tensor_map(op, o.dtype, o.data, {inner, middle, tokens, sequences},
                    {o.strides[2], o.strides[1], o.strides[0]}, {columns, 1, sm90::kTokens, 1});
}

inline sm90::Problem problem_of(const Params& p, const sm90::Work& work) {
  sm90::Problem q{};
  q.work = work;
  q.z = p.z.data;
  for (int i = 0; i < 3; ++i) q.z_strides[i] = p.z.strides[i];
  q.y = p.y;
  q.dt = mamba::view_of(p.dt), q.A = mamba::view_of(p.A), q.D = mamba::view_of(p.D);
  q.dt_bias = mamba::view_of(p.dt_bias);
  q.initial = mamba::view_of(p.initial), q.final = mamba::view_of(p.final);
  q.state_indices = mamba::view_of(p.state_indices), q.cu_seqlens = mamba::view_of(p.cu_seqlens);
  q.checkpoint_tokens = mamba::view_of(p.checkpoint_tokens);
  q.checkpoint_indices = mamba::view_of(p.checkpoint_indices);
  q.has_initial = static_cast<const uint8_t*>(p.has_initial.data), q.has_initial_stride = p.has_initial.strides[0];
  q.sequences = int32_t(p.sequences), q.length = int32_t(p.length), q.tokens = int32_t(p.tokens);
  q.slots = int32_t(p.slots ? p.slots : p.sequences), q.checkpoints = int32_t(p.checkpoints);
  q.heads = int32_t(p.heads), q.head_dim = int32_t(p.head_dim), q.d_state = int32_t(p.d_state);
  q.dt_min = p.dt_min, q.dt_max = p.dt_max, q.dt_softplus = p.dt_softplus;
  return q;
}

// The attribute first: it gives a new thread the device's context, without which the driver may make no maps.
template <typename T, typename Tile>
void launch_tile(const char* op, const Params& p, const sm90::Plan& plan, bool overlaps, cudaStream_t stream) {
  const auto kernel = sm90::tensor_scan_kernel_sm90<T, Tile>;
  N3_CUDA_CHECK(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared));
  const int64_t tokens = p.cu_seqlens.data ? p.tokens : p.length, batch = p.cu_seqlens.data ? 1 : p.sequences;
  CUtensorMap x{}, b{}, c{};
  if (p.tokens) {  // else nobody loads
    x = map_of(op, p.x, p.head_dim, p.heads, tokens, batch, Tile::kColumns);
    b = map_of(op, p.B, p.d_state, p.groups, tokens, batch, 64);
    c = map_of(op, p.C, p.d_state, p.groups, tokens, batch, 64);
  }
  launch_overlapping(op, kernel, {plan.blocks, plan.threads, plan.shared, 1, overlaps}, stream, x, b, c,
                     problem_of(p, plan.work));
}

// The plan's template for elements T.
template <typename T>
void launch(const char* op, const Params& p, bool overlaps, int device, cudaStream_t stream) {
  if (p.heads == 0) return;
  int sms;
  N3_CUDA_CHECK(op, cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  const bool packed = p.cu_seqlens.data;
  const sm90::Plan plan = sm90::plan(p.sequences, packed, p.heads, p.groups, p.head_dim, p.d_state, sms);
  N3_CHECK(op, plan.work.items <= sm90::kMostItems, "sequences times heads must be at most 2^30");
  if (plan.blocks == 0) return;  // a grid of 0 blocks is a launch error
  sm90::with_tile(plan.kernel, [&](auto* type) {
    launch_tile<T, std::remove_pointer_t<decltype(type)>>(op, p, plan, overlaps, stream);
  });
}

}  // namespace n3::ssd_scan
