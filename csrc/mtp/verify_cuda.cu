// n3::mtp_verify: the records of every row that may be looked at, then a walk through each request's chain.
#include "verify.h"

#include <torch/csrc/stable/library.h>

#include "compare_kernel.cuh"
#include "sample_cuda.h"
#include "verify_kernel.cuh"

namespace n3::mtp {
namespace {

using verify::op;

// Modes greedy and coupled: what `sample` draws in every row, compared with the drafts.
void by_target(const RowArgs& a, const VerifyArgs& c, const Tensor& like, cudaStream_t stream) {
  const int64_t units = int64_t(c.requests) * c.width;
  const Tensor own = torch::stable::new_empty(like, {3, units}, ScalarType::Int);
  int32_t* first = static_cast<int32_t*>(own.mutable_data_ptr());
  const SampleArgs draws{c.pos, first, first + units, reinterpret_cast<float*>(first + 2 * units)};
  launch_sample(op, a, draws, units, stream);
  launch_after(op, compare_kernel, (c.requests + kDrawWarps - 1) / kDrawWarps, kDrawThreads, 0, stream, a, c, draws);
}

// The columns of each token, of a drafter with a smaller vocabulary. `room`: for a list of tokens and one of columns.
ColumnMap link_columns(const RowArgs& a, const LawInputs& laws, const Tensor& room, cudaStream_t stream) {
  int32_t* first = static_cast<int32_t*>(room.mutable_data_ptr());
  const ColumnMap columns{laws.map, first, first + a.vocab, laws.mapped, a.vocab};
  launch_after(op, columns_kernel, a.tiles, kColumnsThreads, 0, stream, columns);
  return columns;
}

void by_laws(const RowArgs& a, const RowArgs& drafts, const ColumnMap& columns, const VerifyArgs& c,
             cudaStream_t stream) {
  with_type(a.type, [&]<typename T>() {
    const auto kernel = c.mode <= VerifyMode::kBlock ? verify_kernel<T, false> : verify_kernel<T, true>;
    launch_after(op, kernel, c.requests, kDrawThreads, stage_bytes(a, kDrawWarps), stream, a, drafts, columns, c);
  });
}

// Rows of the call's chains.
RowArgs chains(const RowInputs& rows, const VerifyArgs& c) {
  RowArgs a = rows_of(rows, c.width);
  a.cu_rows = c.cu_rows, a.drafts = c.drafts;
  return a;
}

void mtp_verify(const verify::Call& call) {
  const VerifyArgs& c = call.args;
  if (c.requests == 0) return;
  const DeviceGuard guard(call.like.get_device_index());
  const cudaStream_t stream = current_stream(op, call.like);
  const int64_t units = int64_t(c.requests) * c.width;
  const bool dense = call.drafter.logits != nullptr;
  RowArgs a = chains(call.rows, c);
  if (c.mode >= VerifyMode::kToken) {  // the draft is certain where there is no list
    a.law_tokens = c.drafts, a.law_ids = c.laws.ids, a.entries = c.laws.ids ? c.laws.entries : 1;
    a.law_map = c.laws.map, a.mapped = c.laws.mapped;
    a.apart = c.mode <= VerifyMode::kBlock && !dense;
  }
  const Tensor records =
      add_records(op, a, call.like, units, c.mode != VerifyMode::kGreedy, c.mode == VerifyMode::kTypical);
  launch_records(op, a, units, stream);
  if (c.mode <= VerifyMode::kCoupled) return by_target(a, c, call.like, stream);
  if (!dense) return by_laws(a, {}, {}, c, stream);
  const Tensor room = torch::stable::new_empty(call.like, {a.vocab + c.laws.mapped}, ScalarType::Int);
  const ColumnMap columns = c.laws.map ? link_columns(a, c.laws, room, stream) : ColumnMap{};
  RowArgs drafts = chains(call.drafter, c);
  drafts.certain_at_infinity = true;
  const Tensor own = add_records(op, drafts, call.like, units, true, false);
  launch_records(op, drafts, units, stream);
  by_laws(a, drafts, columns, c, stream);
}

}  // namespace
}  // namespace n3::mtp

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("mtp_verify", TORCH_BOX(&n3::mtp::verify::entry<n3::mtp::mtp_verify>)); }
