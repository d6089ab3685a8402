#include "gemm_cuda.h"

#include <torch/csrc/stable/library.h>

#include "gemm_sm1xx.h"

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace gemm = n3::nvfp4_gemm;

constexpr const char* op = "nvfp4_gemm";

template <int kArch>
gemm::Kernel kernel(gemm::Out out, gemm::Tile tile) {
  switch (out) {
    case gemm::Out::kFloat: return gemm::kernel<kArch, gemm::Out::kFloat>(tile);
    case gemm::Out::kHalf: return gemm::kernel<kArch, gemm::Out::kHalf>(tile);
    default: return gemm::kernel<kArch, gemm::Out::kBFloat16>(tile);
  }
}

gemm::Kernel kernel([[maybe_unused]] int arch, [[maybe_unused]] gemm::Out out, [[maybe_unused]] gemm::Tile tile) {
#ifdef N3_HAS_SM100
  if (arch == 100) return kernel<100>(out, tile);
#endif
#ifdef N3_HAS_SM120
  if (arch == 120) return kernel<120>(out, tile);
#endif
  n3::fail(op, "this library was built without CUTLASS or without sm_", arch);
}

Tensor nvfp4_gemm(const Tensor& a, const Tensor& a_scale, const Tensor& a_global, const Tensor& b,
                  const Tensor& b_scale, const Tensor& b_global, const gemm::OptionalTensor& bias, ScalarType out_dtype,
                  const std::string& a_layout, const std::string& b_layout) {
  const gemm::Params p =
      gemm::check(a, a_scale, a_global, b, b_scale, b_global, bias, out_dtype, a_layout, b_layout);
  const gemm::Out out = gemm::out_of(out_dtype);
  const char* reason = gemm::unsupported(p.m, p.n, p.k, out, p.a.swizzled, p.b.swizzled);
  N3_CHECK(op, !reason, "the CUDA kernel ", reason);
  const gemm::Gpu gpu = gemm::gpu_of(op, a);
  const n3::DeviceGuard guard(a.get_device_index());
  const Tensor y = torch::stable::new_empty(a, {p.m, p.n}, out_dtype);
  if (p.m == 0 || p.n == 0) return y;  // a grid of 0 blocks is a launch error
  const cudaStream_t stream = n3::current_stream(op, a);
  const Tensor a_codes = n3::aligned(a), b_codes = n3::aligned(b);
  const Tensor a_tiles = gemm::tiles(op, a_scale, p.a.swizzled, 1, p.m, p.k, stream);
  const Tensor b_tiles = gemm::tiles(op, b_scale, p.b.swizzled, 1, p.n, p.k, stream);
  const Tensor a_globals = torch::stable::contiguous(a_global), b_globals = torch::stable::contiguous(b_global);
  gemm::OptionalTensor biases;
  if (bias) biases = n3::aligned(*bias);
  const gemm::Call call{gemm::data<uint8_t>(a_codes), gemm::data<uint8_t>(a_tiles),
                        gemm::data<uint8_t>(b_codes), gemm::data<uint8_t>(b_tiles),
                        gemm::data<float>(a_globals), gemm::data<float>(b_globals),
                        p.a.global_per_row,           p.b.global_per_row,
                        biases ? biases->const_data_ptr() : nullptr,
                        y.mutable_data_ptr(),         p.m, p.n, p.k, gpu.sms};
  const gemm::Kernel k = kernel(gpu.arch, out, gemm::tile(p.m, p.n, gpu.sms, n3::batch_invariant()));
  const Tensor workspace = gemm::scratch(a, k.workspace(call));
  const char* wrong = k.launch(call, workspace.mutable_data_ptr(), stream);
  N3_CHECK(op, !wrong, "CUTLASS: ", wrong);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("nvfp4_gemm", TORCH_BOX(&nvfp4_gemm)); }
