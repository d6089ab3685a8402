// The sampler's last kernel, which verification launches too.
#pragma once
#include "rows_cuda.h"
#include "sample_kernel.cuh"

namespace n3::mtp {

void launch_sample(const char* op, const RowArgs& a, const SampleArgs& out, ScalarType dtype, int64_t units,
                   cudaStream_t stream);

}  // namespace n3::mtp
