#include "gemm_sm100.cuh"

template <>
n3::nvfp4_gemm::Kernel n3::nvfp4_gemm::kernel<100, n3::nvfp4_gemm::Out::kCodes>(Tile tile) {
  return sm100::kernel<Out::kCodes>(tile);
}
