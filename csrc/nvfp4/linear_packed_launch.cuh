// How kernels of nvfp4_linear.packed are launched, and what only some GPUs have.
#pragma once
#include <cstdint>

#include "../common/launch.h"
#include "linear_packed.h"
#include "linear_packed_kernel.cuh"

namespace n3::nvfp4_linear_packed {

// From sm_90 on in clusters, and so that it may begin before the kernels before it end.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Plan& plan, Cores cores, cudaStream_t stream,
            const Arguments&... arguments) {
  launch_overlapping(op, kernel,
                     {plan.blocks, plan.threads, plan.shared, cores.clusters ? plan.splits : 1, cores.clusters}, stream,
                     arguments...);
}

// The kernels for many tokens, in a file of their own: they are compiled for sm_90a alone.
#if defined(N3_HAS_SM90)
void launch_wide(const Problem& p, const Plan& plan, bool half, cudaStream_t stream);
#endif

}  // namespace n3::nvfp4_linear_packed
