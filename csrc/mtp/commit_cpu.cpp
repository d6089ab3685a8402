#include "commit.h"

#include <algorithm>

#include <torch/csrc/stable/library.h>

namespace n3::mtp_commit {
namespace {

void mtp_commit(const Call& call) {
  const Args& a = call.args;
  int32_t before = 0;
  for (int64_t b = 0; b < a.requests; ++b) {
    const int32_t n = emitted(a, b);
    commit(a, b, n, before, [](int64_t* bin) { ++*bin; });
    before += n;
  }
  a.cu_emitted[a.requests] = before;
  std::fill(a.flat + before, a.flat + a.requests * a.width, -1);
}

}  // namespace
}  // namespace n3::mtp_commit

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) {
  m.impl("mtp_commit", TORCH_BOX(&n3::mtp_commit::entry<n3::mtp_commit::mtp_commit>));
}
