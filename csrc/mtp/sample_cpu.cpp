// n3::sample: one token per row.
#include "sample.h"

#include <torch/csrc/stable/library.h>

#include "../common/threads.h"
#include "row.h"

namespace n3::mtp {
namespace {

void sample(const sampling::Call& call) {
  const RowInputs& rows = call.rows;
  for_items(rows.rows, int64_t(rows.rows) * rows.vocab, [&](auto take) {
    Row row(rows);
    for (int64_t r = take(); r < rows.rows; r = take()) {
      const int64_t s = value_or(rows.slot, r, int32_t(r));
      Emitted e{-1, 0.f, s >= rows.slots ? kOutOfRange : 0};
      if (s >= 0 && s < rows.slots) e = row.emit(r, s, call.args.pos[r]);
      call.args.tokens[r] = e.token, call.args.logprobs[r] = e.logprob, call.args.flags[r] = e.flags;
    }
  });
}

}  // namespace
}  // namespace n3::mtp

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("sample", TORCH_BOX(&n3::mtp::sampling::entry<n3::mtp::sample>)); }
