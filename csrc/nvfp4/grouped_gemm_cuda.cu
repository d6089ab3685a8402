#include <torch/csrc/stable/library.h>

#include "gemm_cuda.h"
#include "grouped_gemm_prepare.cuh"
#include "grouped_gemm_sm1xx.h"

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace gemm = n3::nvfp4_gemm;
namespace grouped = n3::nvfp4_grouped_gemm;

constexpr const char* op = "nvfp4_grouped_gemm";

template <int kArch>
grouped::Kernel kernel(gemm::Out out) {
  switch (out) {
    case gemm::Out::kFloat: return grouped::kernel<kArch, gemm::Out::kFloat>();
    case gemm::Out::kHalf: return grouped::kernel<kArch, gemm::Out::kHalf>();
    default: return grouped::kernel<kArch, gemm::Out::kBFloat16>();
  }
}

grouped::Kernel kernel([[maybe_unused]] int arch, [[maybe_unused]] gemm::Out out) {
#ifdef N3_HAS_SM100
  if (arch == 100) return kernel<100>(out);
#endif
#ifdef N3_HAS_SM120
  if (arch == 120) return kernel<120>(out);
#endif
  n3::fail(op, "this library was built without CUTLASS or without sm_", arch);
}

Tensor nvfp4_grouped_gemm(const Tensor& a, const Tensor& a_scale, const Tensor& a_global, const Tensor& b,
                          const Tensor& b_scale, const Tensor& b_global, const Tensor& offsets, ScalarType out_dtype,
                          const std::string& b_layout) {
  const gemm::Params p =
      gemm::check_grouped(a, a_scale, a_global, b, b_scale, b_global, offsets, out_dtype, b_layout);
  const gemm::Out out = gemm::out_of(out_dtype);
  const char* reason = grouped::unsupported(p.m, p.n, p.k, p.experts, out, p.b.swizzled);
  N3_CHECK(op, !reason, "the CUDA kernel ", reason);
  const gemm::Gpu gpu = gemm::gpu_of(op, a);
  const n3::DeviceGuard guard(a.get_device_index());
  const Tensor y = torch::stable::new_empty(a, {p.m, p.n}, out_dtype);
  if (p.m == 0 || p.n == 0) return y;
  const cudaStream_t stream = n3::current_stream(op, a);
  const Tensor a_codes = n3::aligned(a), b_codes = n3::aligned(b), ends = torch::stable::contiguous(offsets);
  const Tensor a_scales = torch::stable::contiguous(a_scale);
  const Tensor b_tiles = gemm::tiles(op, b_scale, p.b.swizzled, p.experts, p.n, p.k, stream);
  const Tensor a_globals = torch::stable::contiguous(a_global), b_globals = torch::stable::contiguous(b_global);
  const Tensor a_tiles = gemm::scratch(a, grouped::scale_bytes(p.m, p.k, p.experts));
  grouped::Arrays arrays;
  const Tensor memory = gemm::scratch(a, grouped::place(arrays, nullptr, p.experts));
  grouped::place(arrays, static_cast<char*>(memory.mutable_data_ptr()), p.experts);
  const gemm::Call call{gemm::data<uint8_t>(a_codes), gemm::data<uint8_t>(a_scales),
                        gemm::data<uint8_t>(b_codes), gemm::data<uint8_t>(b_tiles),
                        gemm::data<float>(a_globals), gemm::data<float>(b_globals),
                        p.a.global_per_row,           false,
                        nullptr,                      y.mutable_data_ptr(),
                        p.m, p.n, p.k, gpu.sms};
  const grouped::Groups groups{call, gemm::data<int32_t>(ends), p.experts, gemm::out_bits(out) / 8,
                               static_cast<uint8_t*>(a_tiles.mutable_data_ptr()), arrays};
  const int64_t blocks = grouped::tiles_of(p.m, p.experts);
  grouped::prepare_kernel<<<uint32_t(blocks), grouped::kThreads, 0, stream>>>(groups);
  N3_CUDA_CHECK(op, cudaGetLastError());
  const grouped::Kernel k = kernel(gpu.arch, out);
  const Tensor workspace = gemm::scratch(a, k.workspace(groups));
  const char* wrong = k.launch(groups, workspace.mutable_data_ptr(), stream);
  N3_CHECK(op, !wrong, "CUTLASS: ", wrong);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("nvfp4_grouped_gemm", TORCH_BOX(&nvfp4_grouped_gemm)); }
