#include "gemm_cuda.h"

#include <torch/csrc/stable/library.h>

#include "gemm_quantized.h"
#include "gemm_sm1xx.h"

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace gemm = n3::nvfp4_gemm;

template <int kArch>
gemm::Kernel kernel(gemm::Out out, gemm::Tile tile) {
  switch (out) {
    case gemm::Out::kFloat: return gemm::kernel<kArch, gemm::Out::kFloat>(tile);
    case gemm::Out::kHalf: return gemm::kernel<kArch, gemm::Out::kHalf>(tile);
    case gemm::Out::kCodes: return gemm::kernel<kArch, gemm::Out::kCodes>(tile);
    default: return gemm::kernel<kArch, gemm::Out::kBFloat16>(tile);
  }
}

gemm::Kernel kernel(const char* op, [[maybe_unused]] int arch, [[maybe_unused]] gemm::Out out, [[maybe_unused]] gemm::Tile tile) {
#ifdef N3_HAS_SM100
  if (arch == 100) return kernel<100>(out, tile);
#endif
#ifdef N3_HAS_SM120
  if (arch == 120) return kernel<120>(out, tile);
#endif
  n3::fail(op, "this library was built without CUTLASS or without sm_", arch);
}

// Operands as the kernels want them.
struct Operands {
  const Tensor &a, &a_scale, &a_global, &b, &b_scale, &b_global;
  const gemm::OptionalTensor& bias;
};

void refuse(const char* op, const gemm::Params& p, gemm::Out out) {
  const char* reason = gemm::unsupported(p.m, p.n, p.k, out, p.a.swizzled, p.b.swizzled);
  N3_CHECK(op, !reason, "the CUDA kernel ", reason);
}

// Fills `y`, and what goes with it if it is codes; the current device is that of a.
void multiply(const char* op, const gemm::Params& p, const Operands& in, gemm::Out out, void* y,
              const gemm::Codes& codes) {
  const gemm::Gpu gpu = gemm::gpu_of(op, in.a);
  if (p.m == 0 || p.n == 0) return;  // a grid of 0 blocks is a launch error
  const cudaStream_t stream = n3::current_stream(op, in.a);
  const Tensor a_codes = n3::aligned(in.a), b_codes = n3::aligned(in.b);
  const Tensor a_tiles = gemm::tiles(op, in.a_scale, p.a.swizzled, 1, p.m, p.k, stream);
  const Tensor b_tiles = gemm::tiles(op, in.b_scale, p.b.swizzled, 1, p.n, p.k, stream);
  const Tensor a_globals = torch::stable::contiguous(in.a_global), b_globals = torch::stable::contiguous(in.b_global);
  gemm::OptionalTensor biases;
  if (in.bias) biases = n3::aligned(*in.bias);
  const gemm::Call call{gemm::data<uint8_t>(a_codes), gemm::data<uint8_t>(a_tiles),
                        gemm::data<uint8_t>(b_codes), gemm::data<uint8_t>(b_tiles),
                        gemm::data<float>(a_globals), gemm::data<float>(b_globals),
                        p.a.global_per_row,           p.b.global_per_row,
                        biases ? biases->const_data_ptr() : nullptr,
                        y,                            p.m, p.n, p.k, gpu.sms, codes};
  const gemm::Kernel k = kernel(op, gpu.arch, out, gemm::tile(p.m, p.n, gpu.sms, n3::batch_invariant()));
  const Tensor workspace = gemm::scratch(in.a, k.workspace(call));
  const char* wrong = k.launch(call, workspace.mutable_data_ptr(), stream);
  N3_CHECK(op, !wrong, "CUTLASS: ", wrong);
}

Tensor nvfp4_gemm(const Tensor& a, const Tensor& a_scale, const Tensor& a_global, const Tensor& b,
                  const Tensor& b_scale, const Tensor& b_global, const gemm::OptionalTensor& bias, ScalarType out_dtype,
                  const std::string& a_layout, const std::string& b_layout) {
  constexpr const char* op = "nvfp4_gemm";
  const gemm::Params p =
      gemm::check(a, a_scale, a_global, b, b_scale, b_global, bias, out_dtype, a_layout, b_layout);
  const gemm::Out out = gemm::out_of(out_dtype);
  refuse(op, p, out);
  const n3::DeviceGuard guard(a.get_device_index());
  const Tensor y = torch::stable::new_empty(a, {p.m, p.n}, out_dtype);
  multiply(op, p, {a, a_scale, a_global, b, b_scale, b_global, bias}, out, y.mutable_data_ptr(), {});
  return y;
}

std::tuple<Tensor, Tensor> nvfp4_gemm_quantized(const Tensor& a, const Tensor& a_scale, const Tensor& a_global,
                                                const Tensor& b, const Tensor& b_scale, const Tensor& b_global,
                                                const Tensor& global_scale, const gemm::OptionalTensor& bias,
                                                const std::optional<std::string>& activation,
                                                const std::string& a_layout, const std::string& b_layout,
                                                const std::string& scale_layout) {
  constexpr const char* op = gemm::quantized_op;
  auto [p, codes] = gemm::check_quantized(a, a_scale, a_global, b, b_scale, b_global, global_scale, bias, activation,
                                          a_layout, b_layout, scale_layout);
  refuse(op, p, gemm::Out::kCodes);
  const n3::DeviceGuard guard(a.get_device_index());
  const auto out = gemm::quantized_outputs(a, p, codes);
  codes.global = gemm::data<float>(global_scale);
  multiply(op, p, {a, a_scale, a_global, b, b_scale, b_global, bias}, gemm::Out::kCodes, p.y, codes);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) {
  m.impl("nvfp4_gemm", TORCH_BOX(&nvfp4_gemm));
  m.impl("nvfp4_gemm.quantized", TORCH_BOX(&nvfp4_gemm_quantized));
}
