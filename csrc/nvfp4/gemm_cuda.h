// What the launchers of nvfp4_gemm and nvfp4_grouped_gemm share: which GPU, operands as the kernels want them.
#pragma once
#include <vector>

#include "../common/cuda.h"
#include "gemm.h"
#include "gemm_plan.h"
#include "swizzle.h"

namespace n3::nvfp4_gemm {

struct Gpu {
  int arch;  // 100 or 120
  int sms;
};

inline Gpu gpu_of(const char* op, const Tensor& t) {
  int major, minor, sms;
  const int device = t.get_device_index();
  N3_CUDA_CHECK(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  N3_CUDA_CHECK(op, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  N3_CUDA_CHECK(op, cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  N3_CHECK(op, (major == 10 || major == 12) && minor == 0,
           "the CUDA kernel takes GPUs of compute capability 10.0 and 12.0");
  return {major * 10, sms};
}

inline Out out_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return Out::kFloat;
    case ScalarType::Half: return Out::kHalf;
    default: return Out::kBFloat16;  // check() let nothing else through
  }
}

// `count` matrices of block scales in 128x4 tiles.
inline Tensor tiles(const char* op, const Tensor& scale, bool swizzled, int64_t count, int64_t rows, int64_t k,
                    cudaStream_t stream) {
  const Tensor in = aligned(scale);
  if (swizzled) return in;
  const Tensor out = torch::stable::new_empty(in, {count * scale_bytes(true, rows, k)});
  nvfp4_swizzle::swizzle_on_cuda(op,
                                 {static_cast<const uint8_t*>(in.const_data_ptr()),
                                  static_cast<uint8_t*>(out.mutable_data_ptr()), count, rows, k / 16},
                                 stream);
  return out;
}

// Scratch memory; the caching allocator gives it back to the same stream, in order.
inline Tensor scratch(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, {int64_t(bytes)}, ScalarType::Byte);
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

}  // namespace n3::nvfp4_gemm
