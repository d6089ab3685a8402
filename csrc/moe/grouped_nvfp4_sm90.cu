#include "grouped_nvfp4_sm90_kernel.cuh"
#include "grouped_sm90.h"

namespace n3::grouped_linear::sm90 {

namespace {

// The attribute first: it gives a new thread the device's context, without which the driver may make no map.
template <typename T, bool kGated, To kTo, int kRows>
void launch(const char* op, PackedProblem problem, const Tensor& codes, cudaStream_t stream) {
  const auto kernel = tensor_grouped_nvfp4_kernel_sm90<T, kGated, kTo, kRows>;
  constexpr int kBytes = Packed<kRows>::kBytes;
  N3_CUDA_CHECK(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const Plan plan = sm90::plan(problem.in.rows, codes.size(0), problem.outputs, kTileOutputs<kGated>, kRows,
                               multiprocessors(op, codes));
  problem.in.work = plan.work;
  const CUtensorMap map = nvfp4::map_of(op, codes, kPiece / 2);
  kernel<<<uint32_t(plan.blocks), items::kThreads, kBytes, stream>>>(map, problem);
  N3_CUDA_CHECK(op, cudaGetLastError());
}

// In batch-invariant mode all products have one width.
template <typename T, bool kGated>
void launch_rows(const char* op, const PackedProblem& problem, const Tensor& codes, cudaStream_t stream) {
  const bool narrow = problem.in.rows <= 64 * codes.size(0) && !batch_invariant();
  narrow ? launch<T, kGated, To::kRows, 64>(op, problem, codes, stream)
         : launch<T, kGated, To::kRows, 128>(op, problem, codes, stream);
}

}  // namespace

void multiply(const char* op, const Product& product, const nvfp4::PackedWeights& w, cudaStream_t stream) {
  using device::BF16, device::F16;
  const bool gated = is_gated(product.activation), half = product.x.scalar_type() == ScalarType::Half;
  const Tensor& codes = w.codes;
  const Tensor global = torch::stable::contiguous(w.global);
  const PackedProblem problem{
      {{}, product.x.const_data_ptr(), product.offsets, product.gather, product.sharing, int32_t(product.x.size(0)),
       int32_t(product.rows), int32_t(product.x.size(1))},
      nvfp4::scales_of(w.scale, global),
      product.row_scale,
      product.targets,
      product.y,
      int32_t(nvfp4::pitch_of(codes)),
      int32_t(codes.size(2) / 8),
      int32_t(gated ? codes.size(1) / 2 : codes.size(1)),
      product.activation};
  if (product.to == To::kSlots) return launch<BF16, false, To::kSlots, 128>(op, problem, codes, stream);
  if (product.to == To::kOrdered) {
    return gated ? launch<BF16, true, To::kOrdered, 128>(op, problem, codes, stream)
                 : launch<BF16, false, To::kOrdered, 128>(op, problem, codes, stream);
  }
  const auto launch_type = half ? gated ? launch_rows<F16, true> : launch_rows<F16, false>
                                : gated ? launch_rows<BF16, true> : launch_rows<BF16, false>;
  launch_type(op, problem, codes, stream);
}

}  // namespace n3::grouped_linear::sm90
