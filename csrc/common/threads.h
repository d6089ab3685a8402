// Sharing out work of uneven cost among torch's threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace n3 {

constexpr int64_t kThreadWork = 1 << 19;  // multiply-adds below which another thread costs more than it saves

// Calls body(take) in some threads; take() returns the next item, or `items` and more when there is none left. For
// items whose cost is not known beforehand. `work`: multiply-adds in all.
template <typename Body>
void for_items(int64_t items, int64_t work, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, items * kThreadWork / std::max<int64_t>(work, 1));
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, items, grain, [&](int64_t, int64_t) { body([&] { return next++; }); });
}

}  // namespace n3
