// The gradient of gated_rms_norm. With h what is normalised, n = h rstd and g the gradient of n,
//   dh = rstd (g - n mean(g n)),   dweight = sum over rows of grad_y n, times silu(z) where the gate comes behind.
#pragma once
#include "../common/hopper.cuh"
#include "gated_norm_kernel.cuh"
#include "partial_sums_plan.h"

namespace n3::gated_norm {

struct BackwardArgs {
  Args forward;       // y unused
  View grad_y;        // strides: row, element
  void *dx, *dz;      // contiguous; dz null without a gate
  float* partial;     // [pieces, dim]
  int64_t rows_each;  // of a piece
  bool held;          // the sums of a group fit in shared memory
};

// 8 neighbouring elements of a row, and what both passes derive from them.
struct Point {
  float x[kChunk], dy[kChunk], w[kChunk], z[kChunk];

  template <typename T, bool kVectors>
  N3_DEVICE void load(const BackwardArgs& b, int64_t row, int64_t first, int64_t end) {
    const Args& a = b.forward;
    const int64_t count = end - first;
    load_chunk<T, kVectors>(a.x.data, offset(a.x, row, first), a.x.strides[1], count, x);
    load_chunk<T, kVectors>(b.grad_y.data, offset(b.grad_y, row, first), b.grad_y.strides[1], count, dy);
    load_weight<kVectors>(a.weight, first, count, w);
    if (a.z.data) load_chunk<T, kVectors>(a.z.data, offset(a.z, row, first), a.z.strides[1], count, z);
  }
};

N3_DEVICE float sigmoid(float v) { return 1.f / (1.f + expf(-v)); }

// Two sums over a block, in each thread; `buffer` alternates from call to call, so that one barrier does.
template <int kThreads>
N3_DEVICE float2 block_sums(float a, float b, float2 (&of_warp)[2][kThreads / 32], int buffer) {
  a = device::warp_sum(a), b = device::warp_sum(b);
  if (threadIdx.x % 32 == 0) of_warp[buffer][threadIdx.x / 32] = {a, b};
  __syncthreads();
  float2 sum{0.f, 0.f};
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) sum.x += of_warp[buffer][w].x, sum.y += of_warp[buffer][w].y;
  return sum;
}

//   grid  pieces * groups     block kThreads     smem  backward_plan().shared bytes, dynamic
// A block takes the rows of a piece one after the other, twice each, the second time from the caches. The sums for the
// weight belong to the thread whose columns they are: in shared memory, where its words are kThreads apart, or, of very
// long groups, in `partial` itself.
template <typename T, int kThreads, bool kVectors>
__global__ __launch_bounds__(kThreads, kThreads > 256 ? 1 : 512 / kThreads) void backward_kernel(const BackwardArgs b) {
  __shared__ float2 of_warp[2][kThreads / 32];
  const Args& a = b.forward;
  const uint32_t groups = uint32_t(a.groups);
  const int64_t piece = blockIdx.x / groups, begin = blockIdx.x % groups * a.group_size, end = begin + a.group_size;
  const int64_t dim = a.groups * a.group_size;
  float* partial = b.partial + piece * dim + begin + threadIdx.x * kChunk;
  float* sums = b.held ? reinterpret_cast<float*>(hopper::shared_memory()) + threadIdx.x : partial;
  const int apart = b.held ? kThreads : 1;
  constexpr int64_t kStep = kThreads * kChunk;
  const bool gated = a.z.data, last = a.norm_before_gate;
  const int64_t first_column = begin + threadIdx.x * kChunk;
  for (int64_t i = first_column; i < end; i += kStep) {
    for (int k = 0; k < kChunk && i + k < end; ++k) sums[i - first_column + k * apart] = 0.f;
  }
  const int64_t first_row = piece * b.rows_each;
  const int64_t rows = first_row + b.rows_each < a.rows ? b.rows_each : a.rows - first_row;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = first_row + r;
    Point p;
    float squares = 0.f, products = 0.f;
    for (int64_t i = first_column; i < end; i += kStep) {
      p.load<T, kVectors>(b, row, i, end);
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        const float gate = gated ? p.z[k] * sigmoid(p.z[k]) : 1.f;
        const float h = last ? p.x[k] : p.x[k] * gate, g = last ? p.dy[k] * p.w[k] * gate : p.dy[k] * p.w[k];
        squares = fmaf(h, h, squares);
        products = fmaf(g, h, products);
      }
    }
    const float2 total = block_sums<kThreads>(squares, products, of_warp, int(r % 2));
    const float rstd = 1.f / sqrtf(total.x / float(a.group_size) + a.eps);
    const float mean = total.y / float(a.group_size) * rstd;
    for (int64_t i = first_column; i < end; i += kStep) {
      p.load<T, kVectors>(b, row, i, end);
      float dz[kChunk];
#pragma unroll
      for (int k = 0; k < kChunk; ++k) {
        const float s = gated ? sigmoid(p.z[k]) : 1.f, gate = gated ? p.z[k] * s : 1.f;
        const float slope = gated ? s * fmaf(p.z[k], 1.f - s, 1.f) : 0.f;
        const float n = (last ? p.x[k] : p.x[k] * gate) * rstd;
        const float g = last ? p.dy[k] * p.w[k] * gate : p.dy[k] * p.w[k], dh = rstd * (g - n * mean);
        dz[k] = last ? p.dy[k] * n * p.w[k] * slope : dh * p.x[k] * slope;
        p.x[k] = last ? dh : dh * gate;
        if (kVectors || i + k < end) {
          float& sum = sums[i - first_column + k * apart];
          sum = fmaf(p.dy[k], last ? n * gate : n, sum);
        }
      }
      store_chunk<T, kVectors>(static_cast<T*>(b.dx) + row * dim + i, end - i, p.x);
      if (gated) store_chunk<T, kVectors>(static_cast<T*>(b.dz) + row * dim + i, end - i, dz);
    }
  }
  if (!b.held) return;
  for (int64_t i = first_column; i < end; i += kStep) {
    for (int k = 0; k < kChunk && i + k < end; ++k) {
      partial[i - first_column + k] = sums[i - first_column + k * apart];
    }
  }
}

}  // namespace n3::gated_norm
