#include "grouped_gemm_sm100.cuh"

template <>
n3::nvfp4_grouped_gemm::Kernel n3::nvfp4_grouped_gemm::kernel<100, n3::nvfp4_gemm::Out::kHalf>() {
  return sm100::kernel<Out::kHalf>();
}
