// How ssm_replay_* run on a GPU: pure host arithmetic. The update's grid is ssm_update's.
#pragma once
#include <cstdint>

#include "ssm_update_plan.h"

namespace n3::ssm_replay {

constexpr int kMoveThreads = 256;

// Whether an update of `tokens` tokens folds what is committed into the state: else the next might not fit.
#if defined(__CUDACC__)
__host__ __device__
#endif
inline bool folds(int64_t count, int64_t tokens, int64_t size) {
  return count + 2 * tokens > size;
}

// A thread for each value of a ring's entry: x, then B, then dt.
inline int64_t move_blocks(int64_t values) { return (values + kMoveThreads - 1) / kMoveThreads; }

}  // namespace n3::ssm_replay
