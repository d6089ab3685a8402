// The kernels of grouped_gemm_<dtype>_sm100.cu and grouped_gemm_<dtype>_sm120.cu, for grouped_gemm_cuda.cu. Neither
// CUTLASS nor torch.
#pragma once
#include <cuda_runtime.h>

#include "grouped_gemm_plan.h"

namespace n3::nvfp4_grouped_gemm {

using nvfp4_gemm::Out;

struct Kernel {
  size_t (*workspace)(const Groups&);                                    // bytes of scratch memory
  const char* (*launch)(const Groups&, void* workspace, cudaStream_t);   // null, or what is wrong
};

template <int kArch, Out kOut>
Kernel kernel();

}  // namespace n3::nvfp4_grouped_gemm
