// How the GPU operators on rows of logits are launched: records, kernels that start before the one before ends.
#pragma once
#include "../common/launch.h"
#include "operands.h"
#include "rows.cuh"

namespace n3::mtp {

// `width` rows of a request are looked at.
inline RowArgs rows_of(const RowInputs& rows, int32_t width) {
  RowArgs a{};
  static_cast<RowInputs&>(a) = rows, a.width = width;
  return a;
}

// A workspace for the records of every unit, which must live until all is launched.
[[nodiscard]] inline Tensor add_records(const char* op, RowArgs& a, const Tensor& like, int64_t units, bool weighs,
                                        bool heats) {
  const bool cuts = weighs && (a.top_k || a.top_p || a.min_p);
  const Workspace w = workspace(units, a.vocab, a.entries, weighs, heats, cuts);
  N3_CHECK(op, w.units * w.tiles < int64_t(1) << 31, "rows times tiles of ", kTile,
           " tokens must be below 2^31, got ", w.units * w.tiles);
  const Tensor memory = torch::stable::new_empty(like, {w.bytes}, ScalarType::Byte);
  lay_out(a, w, static_cast<char*>(memory.mutable_data_ptr()), weighs, heats, cuts);
  return memory;
}

// Calls f with the kernels' element type.
template <typename F>
void with_type(int32_t type, F f) {
  if (type == 0) return f.template operator()<float>();
  if (type == 1) return f.template operator()<device::F16>();
  f.template operator()<device::BF16>();
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
void launch_records(const char* op, const RowArgs& a, int64_t units, cudaStream_t stream);

}  // namespace n3::mtp
