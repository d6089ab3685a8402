// How the GPU operators on rows of logits are launched: arguments, records, kernels that start before the one before
// ends.
#pragma once
#include <vector>

#include "../common/launch.h"
#include "rows.cuh"
#include "rows.h"

namespace n3::mtp {

// A call's arguments as the kernels take them; copies where a tensor is not contiguous live as long as this.
class Operands {
 public:
  template <typename T>
  const T* data(const Tensor& t) {
    kept_.push_back(torch::stable::contiguous(t));
    return static_cast<const T*>(kept_.back().const_data_ptr());
  }
  template <typename T>
  const T* data(const OptionalTensor& t) {
    return t ? data<T>(*t) : nullptr;
  }

  // Logits with stride 1 along the last dimension, a draw for each slot; `width` rows of a request are looked at.
  RowArgs rows(const Tensor& logits, const SlotArgs& s, const EditArgs& e, int64_t width) {
    kept_.push_back(logits);
    RowArgs a{};
    a.logits = logits.const_data_ptr(), a.stride = logits.stride(0);
    a.vocab = int32_t(logits.size(1)), a.rows = int32_t(logits.size(0));
    a.slots = int32_t(s.seed.size(0)), a.width = int32_t(width);
    a.slot = data<int32_t>(s.slot), a.temperature = data<float>(s.temperature);
    a.top_k = data<int32_t>(s.top_k), a.top_p = data<float>(s.top_p), a.min_p = data<float>(s.min_p);
    a.bitmask = data<int32_t>(e.bitmask), a.bitmask_row = data<int32_t>(e.bitmask_row);
    a.mask_rows = e.bitmask ? int32_t(e.bitmask->size(0)) : 0;
    a.forced = data<int32_t>(e.forced_token);
    a.bias_ids = data<int32_t>(e.bias_ids), a.bias_val = data<float>(e.bias_val);
    a.bias_cu = data<int32_t>(e.bias_cu), a.biases = e.bias_ids ? int32_t(e.bias_ids->size(0)) : 0;
    return a;
  }

  // A workspace of its own for the records of every unit.
  void add_records(const char* op, RowArgs& a, const Tensor& like, int64_t units, bool weighs, bool heats) {
    const bool cuts = weighs && (a.top_k || a.top_p || a.min_p);
    const Workspace w = workspace(units, a.vocab, a.entries, weighs, heats, cuts);
    N3_CHECK(op, w.units * w.tiles < int64_t(1) << 31, "rows times tiles of ", kTile,
             " tokens must be below 2^31, got ", w.units * w.tiles);
    kept_.push_back(torch::stable::new_empty(like, {w.bytes}, ScalarType::Byte));
    lay_out(a, w, static_cast<char*>(kept_.back().mutable_data_ptr()), weighs, heats, cuts);
  }

 private:
  std::vector<Tensor> kept_;
};

// Calls f with the kernels' element type.
template <typename F>
void with_type(ScalarType dtype, F f) {
  switch (dtype) {  // the checks let nothing else through
    case ScalarType::Float: return f.template operator()<float>();
    case ScalarType::Half: return f.template operator()<device::F16>();
    default: return f.template operator()<device::BF16>();
  }
}

// A kernel that waits for those before by itself; from sm_90 on it may be set up while they run.
template <typename... Parameters, typename... Arguments>
void launch_after(const char* op, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared,
                  cudaStream_t stream, const Arguments&... arguments) {
  int device = 0, major = 0;
  N3_CUDA_CHECK(op, cudaGetDevice(&device));
  N3_CUDA_CHECK(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (major >= 9) return launch_overlapping(op, kernel, {blocks, threads, shared, 1}, stream, arguments...);
  kernel<<<uint32_t(blocks), threads, shared, stream>>>(arguments...);
  N3_CUDA_CHECK(op, cudaGetLastError());
}

// Room for the biased sub-tiles of a block's warps.
inline int stage_bytes(const RowArgs& a, int subs) { return a.bias_ids ? subs * int(kSub * sizeof(float)) : 0; }

// Launches what leaves the records of the units.
void launch_records(const char* op, const RowArgs& a, ScalarType dtype, int64_t units, cudaStream_t stream);

}  // namespace n3::mtp
