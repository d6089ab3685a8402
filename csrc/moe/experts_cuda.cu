#include "experts_cuda.h"

#include <array>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "counter_pool.h"
#include "experts_combine_kernel.cuh"

namespace n3::moe_experts {

namespace {

constexpr int64_t kCounters = 1 << 20;
__device__ uint32_t zeros[kCounters];  // of each device, once a kernel of this file or these words are asked for

struct DevicePool {
  uint32_t* words = nullptr;
  CounterPool pool{kCounters};
};

DevicePool& pool_of(int32_t device) {
  static std::mutex mutex;
  static std::unordered_map<int32_t, std::unique_ptr<DevicePool>> pools;
  const std::lock_guard<std::mutex> lock(mutex);
  std::unique_ptr<DevicePool>& pool = pools[device];
  if (!pool) {
    auto created = std::make_unique<DevicePool>();
    void* words;
    N3_CUDA_CHECK(op, cudaGetSymbolAddress(&words, zeros));
    created->words = static_cast<uint32_t*>(words);
    pool = std::move(created);
  }
  return *pool;
}

}  // namespace

uint32_t* zero_counters(const Tensor& x, int64_t words, cudaStream_t stream, OptionalTensor& owned) {
  cudaStreamCaptureStatus status;
  unsigned long long capture = 0, id = 0;
  N3_CUDA_CHECK(op, cudaStreamGetCaptureInfo(stream, &status, &capture));
  if (status != cudaStreamCaptureStatusActive) capture = 0;
  N3_CUDA_CHECK(op, cudaStreamGetId(stream, &id));
  DevicePool& device = pool_of(x.get_device_index());
  const int64_t first = device.pool.take(capture, id, words);
  if (first >= 0) return device.words + first;
  owned = torch::stable::new_zeros(x, {words}, ScalarType::Int);
  return static_cast<uint32_t*>(owned->mutable_data_ptr());
}

Sorted sort_slots(const Params& p, const Tensor& ids, const OptionalTensor& valid_tokens, cudaStream_t stream) {
  Tensor used = torch::stable::contiguous(ids);
  if (valid_tokens && ids.numel()) {
    constexpr int kThreads = 256;
    const Tensor valid = torch::stable::new_empty(ids, {p.tokens, p.top_k}, ScalarType::Int);
    valid_ids_kernel<<<uint32_t((ids.numel() + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
        static_cast<const int32_t*>(used.const_data_ptr()), static_cast<const int32_t*>(valid_tokens->const_data_ptr()),
        static_cast<int32_t*>(valid.mutable_data_ptr()), ids.numel(), p.top_k, kThreads);
    N3_CUDA_CHECK(op, cudaGetLastError());
    used = valid;
  }
  std::array<StableIValue, 4> stack{torch::stable::detail::from(used), torch::stable::detail::from(p.experts),
                                    torch::stable::detail::from(p.first_expert)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("n3::moe_sort", "", stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, 4> sorted;  // all four are ours to free
  for (int i = 0; i < 4; ++i) sorted[i] = torch::stable::detail::to<Tensor>(stack[i]);
  return {used, sorted[0], sorted[1]};
}

void combine(const Params& p, const Tensor& rows, int32_t parts, const Tensor& weights, const Tensor& ids,
             const Tensor& y, cudaStream_t stream) {
  const Combine c{static_cast<const float*>(rows.const_data_ptr()),
                  static_cast<const float*>(weights.const_data_ptr()),
                  static_cast<const int32_t*>(ids.const_data_ptr()),
                  y.mutable_data_ptr(),
                  p.y_dtype == ScalarType::Float,
                  int32_t(p.top_k),
                  parts,
                  int32_t(p.width),
                  p.first_expert,
                  int32_t(p.experts)};
  const int64_t blocks = p.tokens * ((p.width + sm90::kCombineColumns - 1) / sm90::kCombineColumns);
  combine_kernel<<<uint32_t(blocks), 32 * sm90::kCombineWarps, 0, stream>>>(c);
  N3_CUDA_CHECK(op, cudaGetLastError());
}

}  // namespace n3::moe_experts
