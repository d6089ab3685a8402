// The kernels of gemm_<dtype>_sm100.cu and gemm_<dtype>_sm120.cu, for gemm_cuda.cu. Neither CUTLASS nor torch.
#pragma once
#include <cuda_runtime.h>

#include "gemm_plan.h"

namespace n3::nvfp4_gemm {

struct Kernel {
  size_t (*workspace)(const Call&);                                    // bytes of scratch memory
  const char* (*launch)(const Call&, void* workspace, cudaStream_t);   // null, or what is wrong
};

template <int kArch, Out kOut>
Kernel kernel(Tile tile);

}  // namespace n3::nvfp4_gemm
