// On the CPU: the slots that a call writes must be distinct. Sequences run side by side, so one slot for two of them
// would hold whichever came last. The Python twins are check_distinct and check_prefill in n3kernels/mamba/_slots.py.
#pragma once
#include <algorithm>
#include <vector>

#include "../common/check.h"

namespace n3::mamba {

class WrittenSlots {
 public:
  void add(int64_t slot) {
    if (slot >= 0) slots_.push_back(slot);
  }

  void check(const char* op, const char* name) {
    std::sort(slots_.begin(), slots_.end());
    const auto twice = std::adjacent_find(slots_.begin(), slots_.end());
    N3_CHECK(op, twice == slots_.end(), name, " must be distinct, got ", *twice, " twice");
  }

 private:
  std::vector<int64_t> slots_;
};

// Of a prefill: final states, and checkpoints beside them. Without slots the sequences are numbered through.
template <typename Sequences>
void check_distinct(const char* op, const Sequences& sequences) {
  WrittenSlots written;
  for (const auto& s : sequences) written.add(s.slot);
  written.check(op, "state_indices");
  for (const auto& s : sequences) {
    for (const auto& c : s.checkpoints) written.add(s.slot < 0 ? -1 : c.slot);
  }
  written.check(op, "state_indices and checkpoint_indices");
}

}  // namespace n3::mamba
