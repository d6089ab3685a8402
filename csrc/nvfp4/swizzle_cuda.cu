#include "swizzle.h"

#include <vector>

#include <torch/csrc/stable/library.h>

#include "../common/cuda.h"
#include "swizzle_kernel.cuh"

namespace {

using n3::Tensor;
namespace swizzle = n3::nvfp4_swizzle;

std::vector<int64_t> sizes(const Tensor& like, int64_t rows, int64_t cols) {
  if (like.dim() == 2) return {rows, cols};
  return {like.size(0), rows, cols};
}

template <bool kInverse>
void launch(const char* op, const swizzle::Params& p, cudaStream_t stream) {
  const int64_t words = swizzle::words(p.batch, p.rows, p.cols, !kInverse);
  if (words == 0) return;  // a grid of 0 blocks is a launch error
  swizzle::swizzle_kernel<kInverse>
      <<<swizzle::blocks(words), swizzle::kThreads, 0, stream>>>(p.in, p.out, words, p.rows, p.cols);
  N3_CUDA_CHECK(op, cudaGetLastError());
}

template <bool kInverse>
Tensor run(const char* op, swizzle::Params p, const Tensor& block_scale) {
  const n3::DeviceGuard guard(block_scale.get_device_index());
  const Tensor in = n3::aligned(block_scale);
  const int64_t rows = kInverse ? p.rows : swizzle::padded_rows(p.rows);
  const int64_t cols = kInverse ? p.cols : swizzle::padded_cols(p.cols);
  const Tensor out = torch::stable::new_empty(in, sizes(in, rows, cols));
  p.in = static_cast<const uint8_t*>(in.const_data_ptr());
  p.out = static_cast<uint8_t*>(out.mutable_data_ptr());
  launch<kInverse>(op, p, n3::current_stream(op, in));
  return out;
}

Tensor nvfp4_swizzle_scale(const Tensor& block_scale) {
  return run<false>("nvfp4_swizzle_scale", swizzle::check_swizzle(block_scale), block_scale);
}

Tensor nvfp4_unswizzle_scale(const Tensor& block_scale, int64_t rows, int64_t cols) {
  return run<true>("nvfp4_unswizzle_scale", swizzle::check_unswizzle(block_scale, rows, cols), block_scale);
}

}  // namespace

void n3::nvfp4_swizzle::swizzle_on_cuda(const char* op, const Params& p, void* stream) {
  launch<false>(op, p, static_cast<cudaStream_t>(stream));
}

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) {
  m.impl("nvfp4_swizzle_scale", TORCH_BOX(&nvfp4_swizzle_scale));
  m.impl("nvfp4_unswizzle_scale", TORCH_BOX(&nvfp4_unswizzle_scale));
}
