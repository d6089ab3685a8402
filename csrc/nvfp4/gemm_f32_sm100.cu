#include "gemm_sm100.cuh"

template <>
n3::nvfp4_gemm::Kernel n3::nvfp4_gemm::kernel<100, n3::nvfp4_gemm::Out::kFloat>(Tile tile) {
  return sm100::kernel<Out::kFloat>(tile);
}
