// The sampler's last kernel, which verification launches too.
#pragma once
#include "rows_cuda.h"

namespace n3::mtp {

void launch_sample(const char* op, const RowArgs& a, const SampleArgs& out, int64_t units, cudaStream_t stream);

}  // namespace n3::mtp
