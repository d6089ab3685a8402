// y = weight * RMSNorm(x * silu(z)) over groups, or weight * RMSNorm(x) * silu(z).
#pragma once
#include "gated_norm_plan.h"
#include "views.cuh"

namespace n3::gated_norm {

using mamba::View;

struct Args {
  View x, z;       // strides: row, element; z.data null without a gate
  View weight;     // stride: element
  void* y;         // contiguous [rows, groups * group_size]
  int64_t rows, groups, group_size;
  float eps;
  bool norm_before_gate;
};

// `count` elements, at most 8, and zeros behind them.
template <typename T, bool kVectors>
N3_DEVICE void load_chunk(const void* data, int64_t at, int64_t stride, int64_t count, float (&out)[kChunk]) {
  const T* from = static_cast<const T*>(data) + at;
  if constexpr (kVectors) {
    mamba::load8(from, out);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) out[i] = i < count ? device::widen(from[i * stride]) : 0.f;
  }
}

template <bool kVectors>
N3_DEVICE void load_weight(const View& w, int64_t first, int64_t count, float (&out)[kChunk]) {
  const int64_t at = first * w.strides[0];
  if (w.type == mamba::Type::kFloat) return load_chunk<float, kVectors>(w.data, at, w.strides[0], count, out);
  if (w.type == mamba::Type::kHalf) return load_chunk<device::F16, kVectors>(w.data, at, w.strides[0], count, out);
  load_chunk<device::BF16, kVectors>(w.data, at, w.strides[0], count, out);
}

// What is normalised; `gate` becomes silu(z).
template <typename T, bool kVectors>
N3_DEVICE void load_gated(const Args& a, int64_t row, int64_t first, int64_t end, float (&h)[kChunk],
                          float (&gate)[kChunk]) {
  load_chunk<T, kVectors>(a.x.data, offset(a.x, row, first), a.x.strides[1], end - first, h);
  if (!a.z.data) return;
  load_chunk<T, kVectors>(a.z.data, offset(a.z, row, first), a.z.strides[1], end - first, gate);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    gate[i] = mamba::silu(gate[i]);
    if (!a.norm_before_gate) h[i] *= gate[i];
  }
}

//   grid  plan().blocks     block block_threads(kThreads), kThreads to a group     smem  one word per warp
// Two passes over the group, the second from the caches: a group is at most a few thousand elements. A thread sums its
// chunks in order, then the lanes pairwise, then the warps in order: the bits depend on the group alone, and not on
// whether x, z and weight could be read in vectors, rows and groups at multiples of 16 bytes (kVectors).
template <typename T, int kThreads, bool kVectors>
__global__ __launch_bounds__(block_threads(kThreads), !kVectors ? 1 : kThreads > 128 ? 2 : 8) void forward_kernel(
    const Args a) {
  constexpr int kPerBlock = block_threads(kThreads) / kThreads;
  const int64_t index = int64_t(blockIdx.x) * kPerBlock + threadIdx.x / kThreads;
  const int lane = threadIdx.x % kThreads;
  const bool inside = index < a.rows * a.groups;
  const int64_t row = inside ? index / a.groups : 0, begin = inside ? index % a.groups * a.group_size : 0;
  const int64_t end = inside ? begin + a.group_size : 0;  // an idle warp has an empty group

  float h[kChunk], gate[kChunk], weight[kChunk];
  float sum = 0.f;
  for (int64_t i = begin + lane * kChunk; i < end; i += kThreads * kChunk) {
    load_gated<T, kVectors>(a, row, i, end, h, gate);
#pragma unroll
    for (int k = 0; k < kChunk; ++k) sum = fmaf(h[k], h[k], sum);
  }
  sum = device::warp_sum(sum);
  if constexpr (kThreads > 32) {
    __shared__ float of_warp[kThreads / 32];
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.f;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) sum += of_warp[w];
  }
  const float rstd = 1.f / sqrtf(sum / float(a.group_size) + a.eps);

  T* y = static_cast<T*>(a.y) + row * a.groups * a.group_size;
  for (int64_t i = begin + lane * kChunk; i < end; i += kThreads * kChunk) {
    load_gated<T, kVectors>(a, row, i, end, h, gate);
    load_weight<kVectors>(a.weight, i, end - i, weight);
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      h[k] = h[k] * rstd * weight[k];
      if (a.z.data && a.norm_before_gate) h[k] *= gate[k];
    }
    if constexpr (kVectors) {
      mamba::store8(y + i, h);
    } else {
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        if (i + k < end) y[i + k] = device::narrow<T>(h[k]);
      }
    }
  }
}

}  // namespace n3::gated_norm
