#include "order_cuda.h"

#include "../common/cuda.h"
#include "order_kernel.cuh"

namespace n3::moe_experts::sm90::nvfp4 {

Tensor in_order(const char* op, const Tensor& x, cudaStream_t stream) {
  const int64_t rows = x.size(0), k = x.size(1), units = (k + kUnit - 1) / kUnit;
  const Tensor from = aligned(x), to = torch::stable::new_empty(x, {rows, units * kUnit}, x.scalar_type());
  if (rows == 0) return to;  // a grid of 0 blocks is a launch error
  order_kernel<<<uint32_t((rows * units * 4 + kOrderThreads - 1) / kOrderThreads), kOrderThreads, 0, stream>>>(
      static_cast<const uint16_t*>(from.const_data_ptr()), static_cast<uint16_t*>(to.mutable_data_ptr()), rows,
      int32_t(k), int32_t(units));
  N3_CUDA_CHECK(op, cudaGetLastError());
  return to;
}

}  // namespace n3::moe_experts::sm90::nvfp4
