#include "grouped_gemm_sm120.cuh"

template <>
n3::nvfp4_grouped_gemm::Kernel n3::nvfp4_grouped_gemm::kernel<120, n3::nvfp4_gemm::Out::kFloat>() {
  return sm120::kernel<Out::kFloat>();
}
