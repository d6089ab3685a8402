// Adds, in order, what the blocks of backward kernels left. For one .cu file: sum_kernel is no template.
#pragma once
#include "partial_sums.cuh"

namespace n3::mamba {

//   grid  ceil(rows * channels / kSumColumns)     block kSumColumns * kSumSlices     smem  one word per thread
// Slice i of a column adds pieces i * each .. in order, then the slices are added in order.
__global__ __launch_bounds__(kSumColumns * kSumSlices) void sum_kernel(const SumArgs a) {
  __shared__ float of_slice[kSumSlices][kSumColumns];
  const int lane = threadIdx.x % kSumColumns, slice = threadIdx.x / kSumColumns;
  const int64_t column = int64_t(blockIdx.x) * kSumColumns + lane, columns = a.rows * a.channels;
  const int64_t each = (a.pieces + kSumSlices - 1) / kSumSlices, begin = slice * each;
  const int64_t end = begin + each < a.pieces ? begin + each : a.pieces;
  float sum = 0.f;
  if (column < columns) {
#pragma unroll 4
    for (int64_t i = begin; i < end; ++i) sum += a.partial[i * columns + column];
  }
  of_slice[slice][lane] = sum;
  __syncthreads();
  if (slice || column >= columns) return;
#pragma unroll
  for (int i = 1; i < kSumSlices; ++i) sum += of_slice[i][lane];
  const int64_t row = column / a.channels, c = column % a.channels;
  if (row < a.width) {
    store(a.weight, c * a.width + row, sum);
  } else if (a.bias.data) {
    store(a.bias, c, sum);
  }
}

}  // namespace n3::mamba
