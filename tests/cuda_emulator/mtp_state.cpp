// mtp_commit and thinking_budget under the emulator, with C entries for tests/mtp/test_commit_cuda_kernels.py, which
// fills in the kernels' own structures as the launchers do.
#include "cuda_emulator.h"
#include "hopper_emulator.h"

inline void atomicAdd(unsigned long long* at, unsigned long long v) { *at += v; }  // one thread runs at a time

#include "mtp/commit_kernel.cuh"
#include "mtp/thinking_budget_kernel.cuh"

namespace commit = n3::mtp_commit;
namespace thinking = n3::thinking_budget;

extern "C" {

void emulate_commit(const commit::Args* a, bool reversed) {
  emulator::launch(1, commit::kThreads, reversed, [&] { commit::commit_kernel(*a); });
}

void emulate_budget(const thinking::Args* a, bool reversed) {
  const int64_t blocks = (a->requests + thinking::kWarps - 1) / thinking::kWarps;
  emulator::launch(blocks, 32 * thinking::kWarps, reversed, [&] { thinking::budget_kernel(*a); });
}

int64_t size_of_arguments(int which) { return which ? sizeof(thinking::Args) : sizeof(commit::Args); }

}  // extern "C"
