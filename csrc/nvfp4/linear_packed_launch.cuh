// How kernels of nvfp4_linear.packed are launched, and what only some GPUs have.
#pragma once
#include <cstdint>

#include "../common/cuda.h"
#include "linear_packed.h"
#include "linear_packed_kernel.cuh"

namespace n3::nvfp4_linear_packed {

// From sm_90 on in clusters, and so that it may begin before the kernels before it end.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Plan& plan, Cores cores, cudaStream_t stream,
            const Arguments&... arguments) {
  N3_CUDA_CHECK(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared));
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = uint32_t(plan.splits);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(uint32_t(plan.blocks));
  config.blockDim = dim3(uint32_t(plan.threads));
  config.dynamicSmemBytes = size_t(plan.shared);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = !cores.clusters ? 0 : plan.splits > 1 ? 2 : 1;
  N3_CUDA_CHECK(op, cudaLaunchKernelEx(&config, kernel, arguments...));
}

// The kernels for many tokens, in a file of their own: they are compiled for sm_90a alone.
#if defined(N3_HAS_SM90)
void launch_wide(const Problem& p, const Plan& plan, bool half, cudaStream_t stream);
#endif

}  // namespace n3::nvfp4_linear_packed
