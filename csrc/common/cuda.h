// What a launcher needs of the host: the current stream, the device guard, error checks, aligned operands. Stable ABI
// only, compiled against a CPU torch.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include "check.h"

// Lives in libtorch_cuda. Weak: null in a CPU-only torch, where no CUDA tensor can reach a launcher.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace n3 {

using torch::stable::accelerator::DeviceGuard;

inline cudaStream_t current_stream(const char* op, const Tensor& t) {
  N3_CHECK(op, aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// A launch error is reported where it happened and does not stay behind for the next call.
#define N3_CUDA_CHECK(op, call)                                                                              \
  do {                                                                                                       \
    const cudaError_t error_ = (call);                                                                       \
    if (error_ != cudaSuccess) {                                                                             \
      (void)cudaGetLastError(); /* what only returns its error leaves it behind too */                       \
      ::n3::fail(op, cudaGetErrorName(error_), ": ", cudaGetErrorString(error_));                            \
    }                                                                                                        \
  } while (0)

// Contiguous and 16-byte aligned, for vector loads: a view into a larger tensor may start anywhere.
inline Tensor aligned(const Tensor& t) {
  const Tensor c = torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(c.const_data_ptr()) % 16 ? torch::stable::clone(c) : c;
}

// n3kernels.batch_invariant(): read by plan() at each call. The process starts with what N3_BATCH_INVARIANT says.
inline std::atomic<bool>& batch_invariant() {
  static std::atomic<bool> mode{[] {
    const char* wanted = std::getenv("N3_BATCH_INVARIANT");
    return wanted && !std::strcmp(wanted, "1");
  }()};
  return mode;
}

}  // namespace n3
