#include "gemm_sm120.cuh"

template <>
n3::nvfp4_gemm::Kernel n3::nvfp4_gemm::kernel<120, n3::nvfp4_gemm::Out::kCodes>(Tile) {
  return sm120::kernel<Out::kCodes>();
}
