// Launch of the kernel that adds what the backward kernels left.
#pragma once
#include "operands_cuda.h"
#include "partial_sums.cuh"

namespace n3::mamba {

// Compiled once, in partial_sums_cuda.cu.
void launch_sums(const char* op, const SumArgs& a, cudaStream_t stream);

}  // namespace n3::mamba
