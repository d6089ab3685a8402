// mamba2_decode: convolution, state update, gate and norm of running sequences in one launch.
#pragma once
#include "conv1d_update_kernel.cuh"
#include "mamba2_decode_plan.h"
#include "ssm_update_kernel.cuh"

namespace n3::mamba2 {

using mamba::View;

struct NormArgs {
  View z, y;       // strides: sequence, token, channel
  View weight;     // stride: channel; data null: y * silu(z)
  int64_t group_size;
  float eps;
  bool norm_before_gate;
};

struct DecodeArgs {
  causal_conv1d::UpdateArgs conv;  // y unused
  ssm_update::Args ssm;            // x, B, C and y unused
  NormArgs norm;
  int64_t groups;
};

// The norm of one group of one token, u[0 .. group_size), of which the first is channel `first`; u is overwritten.
// A thread sums every kDecodeThreads-th element, then the lanes pairwise, then the warps in order.
N3_DEVICE void normalise(const NormArgs& a, int64_t b, int64_t t, int64_t first, float* u, float* of_warp) {
  float sum = 0.f;
  for (int64_t i = threadIdx.x; i < a.group_size; i += kDecodeThreads) {
    if (!a.norm_before_gate || !a.weight.data) u[i] *= mamba::silu(mamba::load(a.z, offset(a.z, b, t, first + i)));
    sum = fmaf(u[i], u[i], sum);
  }
  float rstd = 1.f;
  if (a.weight.data) {
    sum = device::warp_sum(sum);
    __syncthreads();  // the group before has been read out
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.f;
    for (int w = 0; w < kDecodeThreads / 32; ++w) sum += of_warp[w];
    rstd = 1.f / sqrtf(sum / float(a.group_size) + a.eps);
  }
  for (int64_t i = threadIdx.x; i < a.group_size; i += kDecodeThreads) {
    float v = u[i];
    if (a.weight.data) {
      v = v * rstd * mamba::load(a.weight, (first + i) * a.weight.strides[0]);
      if (a.norm_before_gate) v *= mamba::silu(mamba::load(a.z, offset(a.z, b, t, first + i)));
    }
    mamba::store(a.y, offset(a.y, b, t, first + i), v);
  }
}

// Convolution of one channel into shared memory, for the dtype of zxbcdt.
template <typename T>
N3_DEVICE void convolve_into(const causal_conv1d::UpdateArgs& a, int64_t b, int64_t channel, float* to,
                             int64_t token_stride) {
  const causal_conv1d::Channel<T> c(a, b, channel);
  c.convolve([&](int64_t t, float v) { to[t * token_stride] = v; });
  c.write_states();
}

//   grid  plan().blocks: a sequence and a group of heads     block kDecodeThreads
//   smem  dynamic: per token B and C of the group (width floats each), x of its heads, dt and decay
// The channels of the group's x, B and C are convolved, in shared memory; then the heads' states are streamed, the rows
// to come on their way while a row is computed; y takes the place of x; then it is gated and normalised.
template <typename State, typename RowT>
__global__ __launch_bounds__(kDecodeThreads, 2) void decode_kernel(const DecodeArgs a) {
  constexpr int kLanes = RowT::kThreadsOfRow, kRows = kDecodeThreads / kLanes, kWidth = RowT::kWidth;
#if defined(__CUDACC__)
  extern __shared__ float4 memory[];
  float* const shared = reinterpret_cast<float*>(memory);
#else
  float* const shared = reinterpret_cast<float*>(::emulator::dynamic_shared);
#endif
  __shared__ float of_warp[kDecodeThreads / 32];
  const ssm_update::Args& ssm = a.ssm;
  const mamba::Digits at_block = mamba::digits(blockIdx.x, ssm.slots.batch, a.groups);
  const int64_t g = at_block.inner, b = at_block.middle, tokens = ssm.slots.tokens;
  const int64_t heads = ssm.heads_per_group, inner = heads * ssm.head_dim, first_head = g * heads;
  const int64_t source = ssm.slots.read(b), count = source < 0 ? 0 : ssm.slots.count(b);
  for (int64_t i = threadIdx.x; i < (tokens - count) * inner; i += kDecodeThreads) {
    mamba::store(a.norm.y, offset(a.norm.y, b, count + i / inner, g * inner + i % inner), 0.f);
  }
  if (source < 0) return;

  float* const B = shared;                    // [tokens][kWidth], and so C
  float* const C = B + tokens * kWidth;
  float* const x = C + tokens * kWidth;       // [tokens][inner]
  float* const dt = x + tokens * inner;       // [tokens][heads], and so decay
  float* const decay = dt + tokens * heads;
  for (int64_t i = threadIdx.x; i < inner + 2 * kWidth; i += kDecodeThreads) {
    const int64_t k = (i - inner) % kWidth, which = i < inner ? 0 : i - inner < kWidth ? 1 : 2;
    if (which && k >= ssm.d_state) {
      for (int64_t t = 0; t < tokens; ++t) (which == 1 ? B : C)[t * kWidth + k] = 0.f;
      continue;
    }
    const int64_t all = ssm.heads * ssm.head_dim, behind = which == 2 ? a.groups : 0;
    const int64_t channel = which ? all + (behind + g) * ssm.d_state + k : g * inner + i;
    float* const to = which == 0 ? x + i : (which == 1 ? B : C) + k;
    const int64_t stride = which ? kWidth : inner;
    if (a.conv.x.type == mamba::Type::kFloat) {
      convolve_into<float>(a.conv, b, channel, to, stride);
    } else if (a.conv.x.type == mamba::Type::kHalf) {
      convolve_into<mamba::F16>(a.conv, b, channel, to, stride);
    } else {
      convolve_into<mamba::BF16>(a.conv, b, channel, to, stride);
    }
  }
  for (int64_t i = threadIdx.x; i < count * heads; i += kDecodeThreads) {
    dt[i] = ssm.time.step(b, i / heads, first_head + i % heads);
    decay[i] = ssm.time.decay(first_head + i % heads, dt[i]);
  }
  __syncthreads();

  const int lane = threadIdx.x % kLanes;
  const mamba::RowShape shape{ssm.d_state, 1};
  RowT row, ahead;
  const int64_t r = threadIdx.x / kLanes;
  if (r < inner) {
    ssm_update::read_row<State>(ssm, b, source, first_head + r / ssm.head_dim, r % ssm.head_dim, lane, ahead);
  }
  for (int64_t r0 = 0; r0 < inner; r0 += kRows) {
    const bool active = r0 + r < inner;
    const int64_t at = active ? r0 + r : inner - 1, h = at / ssm.head_dim, p = at % ssm.head_dim, next = at + kRows;
    row = ahead;
    if (next < inner) {
      ssm_update::read_row<State>(ssm, b, source, first_head + next / ssm.head_dim, next % ssm.head_dim, lane, ahead);
    }
    for (int64_t t = count == 0 ? -1 : 0; t < count || t < 0; ++t) {
      if (t >= 0) {
        const float in = active ? x[t * inner + at] : 0.f;  // the last row's place is being written by its own lanes
        row.advance(decay[t * heads + h], dt[t * heads + h] * in, B + t * kWidth, shape, lane);
        const float sum = row.dot(C + t * kWidth, shape, lane);
        if (active && lane == 0) {
          x[t * inner + at] = ssm_update::finish(ssm.D, View{}, b, t, first_head + h, p, in, sum);
        }
      }
      const int64_t slot = ssm.slots.written(b, t, count, source);
      if (slot >= 0) {
        ssm_update::write_row<State>(ssm, slot, first_head + h, p, lane, active, t < 0 ? 0 : t, row);
      }
    }
  }
  __syncthreads();
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t i = 0; i < inner; i += a.norm.group_size) {
      normalise(a.norm, b, t, g * inner + i, x + t * inner + i, of_warp);
    }
  }
}

// The last of the three launches, where the mixer is not fused: y in float32 [batch, tokens, channels], overwritten.
//   grid  batch * tokens * channels / group_size     block kDecodeThreads     smem  one word per warp
template <int kThreads>
__global__ __launch_bounds__(kThreads) void finish_kernel(const NormArgs a, const mamba::Slots slots, float* u,
                                                          int64_t groups) {
  __shared__ float of_warp[kThreads / 32];
  const mamba::Digits at = mamba::digits(blockIdx.x, slots.tokens, groups);
  const int64_t j = at.inner, t = at.middle, b = at.outer;
  if (slots.read(b) < 0 || t >= slots.count(b)) {
    for (int64_t i = threadIdx.x; i < a.group_size; i += kThreads) {
      mamba::store(a.y, offset(a.y, b, t, j * a.group_size + i), 0.f);
    }
    return;
  }
  normalise(a, b, t, j * a.group_size, u + int64_t(blockIdx.x) * a.group_size, of_warp);
}

}  // namespace n3::mamba2
