#include "partial_sums_cuda.h"

#include "partial_sums_kernel.cuh"

namespace n3::mamba {

void launch_sums(const char* op, const SumArgs& a, cudaStream_t stream) {
  const int64_t blocks = (a.rows * a.channels + kSumColumns - 1) / kSumColumns;
  if (blocks == 0) return;  // a grid of 0 blocks is a launch error
  check_grid(op, blocks);
  sum_kernel<<<uint32_t(blocks), kSumColumns * kSumSlices, 0, stream>>>(a);
  N3_CUDA_CHECK(op, cudaGetLastError());
}

}  // namespace n3::mamba
