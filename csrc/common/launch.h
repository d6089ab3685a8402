// Launches of sm_90: clusters of blocks, and kernels that may begin before the ones before them end.
#pragma once
#include "cuda.h"

namespace n3 {

struct Grid {
  int64_t blocks;        // a multiple of cluster
  int threads;
  int shared;            // bytes, dynamic
  int cluster;           // blocks of a cluster; 1: none
  bool overlaps = true;  // false before sm_90, which has neither
};

// For kernels that call hopper::wait_for_previous().
template <typename... Parameters, typename... Arguments>
void launch_overlapping(const char* op, void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
                        const Arguments&... arguments) {
  N3_CUDA_CHECK(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared));
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = uint32_t(grid.cluster);
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(uint32_t(grid.blocks));
  config.blockDim = dim3(uint32_t(grid.threads));
  config.dynamicSmemBytes = size_t(grid.shared);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = !grid.overlaps ? 0 : grid.cluster > 1 ? 2 : 1;
  N3_CUDA_CHECK(op, cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace n3
