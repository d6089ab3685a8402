#include <type_traits>

#include "grouped_linear_sm90_kernel.cuh"
#include "grouped_sm90.h"

namespace n3::grouped_linear::sm90 {

bool in_rows(const Tensor& w) {
  bool fit = w.stride(2) == 1 && reinterpret_cast<uintptr_t>(w.const_data_ptr()) % 16 == 0;
  for (int i = 0; i < 2; ++i) fit = fit && (w.size(i) <= 1 || (w.stride(i) > 0 && w.stride(i) % 8 == 0));
  return fit;
}

namespace {

// The attribute first: it gives a new thread the device's context, without which the driver may make no map.
template <typename T, bool kGated, To kTo>
void launch(const char* op, Problem problem, const Tensor& w, cudaStream_t stream) {
  const auto kernel = tensor_grouped_kernel_sm90<T, kGated, kTo>;
  N3_CUDA_CHECK(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Dense::kBytes));
  const Plan plan = sm90::plan(problem.in.rows, w.size(0), problem.outputs, kOutputs / (kGated ? 2 : 1), Dense::kRows,
                               multiprocessors(op, w));
  problem.in.work = plan.work;
  const CUtensorMap map = tensor_map(op, w.scalar_type(), w.const_data_ptr(), {w.size(2), w.size(1), w.size(0), 1},
                                     {w.stride(1), w.stride(0), 0}, {64, 64, 1, 1});
  kernel<<<uint32_t(plan.blocks), items::kThreads, Dense::kBytes, stream>>>(map, problem);
  N3_CUDA_CHECK(op, cudaGetLastError());
}

}  // namespace

void multiply(const char* op, const Product& product, const Tensor& w, cudaStream_t stream) {
  using device::BF16, device::F16;
  const bool gated = is_gated(product.activation), half = product.x.scalar_type() == ScalarType::Half;
  const Problem problem{{{}, product.x.const_data_ptr(), product.offsets, product.gather, product.sharing,
                         int32_t(product.x.size(0)), int32_t(product.rows), int32_t(product.x.size(1))},
                        product.row_scale,
                        product.targets,
                        product.y,
                        int32_t(gated ? w.size(1) / 2 : w.size(1)),
                        product.activation};
  if (product.to == To::kSlots) return launch<BF16, false, To::kSlots>(op, problem, w, stream);
  const auto launch_type = half ? gated ? launch<F16, true, To::kRows> : launch<F16, false, To::kRows>
                                : gated ? launch<BF16, true, To::kRows> : launch<BF16, false, To::kRows>;
  launch_type(op, problem, w, stream);
}

}  // namespace n3::grouped_linear::sm90
