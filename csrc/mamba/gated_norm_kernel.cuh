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

template <typename T, bool kVectors>
N3_DEVICE void store_chunk(T* to, int64_t count, const float (&v)[kChunk]) {
  if constexpr (kVectors) {
    mamba::store8(to, v);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      if (i < count) to[i] = device::narrow<T>(v[i]);
    }
  }
}

template <bool kVectors>
N3_DEVICE void load_weight(const View& w, int64_t first, int64_t count, float (&out)[kChunk]) {
  const int64_t at = first * w.strides[0];
  if (w.type == mamba::Type::kFloat) return load_chunk<float, kVectors>(w.data, at, w.strides[0], count, out);
  if (w.type == mamba::Type::kHalf) return load_chunk<device::F16, kVectors>(w.data, at, w.strides[0], count, out);
  load_chunk<device::BF16, kVectors>(w.data, at, w.strides[0], count, out);
}

// Columns begin .. end of a row, whose first elements are x[x], z[z] and y[y].
struct Group {
  int64_t x, z, y, begin, end;
};

// What is normalised, from column `first` on; `gate` becomes silu(z).
template <typename X, typename T, bool kVectors>
N3_DEVICE void load_gated(const Args& a, const Group& g, int64_t first, float (&h)[kChunk], float (&gate)[kChunk]) {
  load_chunk<X, kVectors>(a.x.data, g.x + first * a.x.strides[1], a.x.strides[1], g.end - first, h);
  if (!a.z.data) return;
  load_chunk<T, kVectors>(a.z.data, g.z + first * a.z.strides[1], a.z.strides[1], g.end - first, gate);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    gate[i] = mamba::silu(gate[i]);
    if (!a.norm_before_gate) h[i] *= gate[i];
  }
}

// The sum over the threads of a group, in each of them. Not to be called twice without a barrier between.
template <int kThreads>
N3_DEVICE float group_sum(float sum) {
  sum = device::warp_sum(sum);
  if constexpr (kThreads > 32) {
    __shared__ float of_warp[kThreads / 32];
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.f;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) sum += of_warp[w];
  }
  return sum;
}

// What `lane` of the kThreads of a group does; `begin` == `end`: an empty group. Two passes over the group, the second
// from the caches: a group is at most a few thousand elements. A thread sums its chunks in order, then the lanes
// pairwise, then the warps in order: the bits depend on the group alone, and not on whether x, z and weight could be
// read in vectors, rows and groups at multiples of 16 bytes (kVectors). y may lie in the place of x, whose elements X may
// differ in type from those T of z and y, not in size.
template <typename X, typename T, int kThreads, bool kVectors>
N3_DEVICE void normalise_group(const Args& a, const Group& g, int lane) {
  float h[kChunk], gate[kChunk], weight[kChunk];
  float sum = 0.f;
  for (int64_t i = g.begin + lane * kChunk; i < g.end; i += kThreads * kChunk) {
    load_gated<X, T, kVectors>(a, g, i, h, gate);
#pragma unroll
    for (int k = 0; k < kChunk; ++k) sum = fmaf(h[k], h[k], sum);
  }
  const float rstd = 1.f / sqrtf(group_sum<kThreads>(sum) / float(a.group_size) + a.eps);

  for (int64_t i = g.begin + lane * kChunk; i < g.end; i += kThreads * kChunk) {
    load_gated<X, T, kVectors>(a, g, i, h, gate);
    load_weight<kVectors>(a.weight, i, g.end - i, weight);
#pragma unroll
    for (int k = 0; k < kChunk; ++k) {
      h[k] = h[k] * rstd * weight[k];
      if (a.z.data && a.norm_before_gate) h[k] *= gate[k];
    }
    store_chunk<T, kVectors>(static_cast<T*>(a.y) + g.y + i, g.end - i, h);
  }
}

// Row and group of a thread of `block`; false behind the last.
template <int kThreads>
N3_DEVICE bool group_of(const Args& a, uint32_t block, int64_t& row, int64_t& begin) {
  constexpr uint32_t kPerBlock = block_threads(kThreads) / kThreads;
  const uint32_t index = block * kPerBlock + threadIdx.x / kThreads, groups = uint32_t(a.groups);
  row = index / groups, begin = index % groups * a.group_size;
  return row < a.rows;
}

//   grid  plan().blocks     block block_threads(kThreads), kThreads to a group     smem  one word per warp
template <typename T, int kThreads, bool kVectors>
__global__ __launch_bounds__(block_threads(kThreads), !kVectors ? 1 : kThreads > 128 ? 2 : 8) void forward_kernel(
    const Args a) {
  Group g{};  // of an idle warp: empty
  int64_t row;
  if (group_of<kThreads>(a, blockIdx.x, row, g.begin)) {
    g.x = row * a.x.strides[0], g.z = row * a.z.strides[0], g.y = row * a.groups * a.group_size;
    g.end = g.begin + a.group_size;
  } else {
    g.begin = 0;
  }
  normalise_group<T, T, kThreads, kVectors>(a, g, threadIdx.x % kThreads);
}

}  // namespace n3::gated_norm
