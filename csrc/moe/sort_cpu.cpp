#include "sort.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

namespace {

namespace sort = n3::moe_sort;
using n3::ScalarType;
using n3::Tensor;

constexpr int64_t kGrain = 1 << 14;  // slots of a thread at least: some 20 us

// The group of a slot: its local expert, or behind them.
int64_t group_of(const sort::Params& p, int32_t id) {
  const uint64_t local = uint64_t(int64_t(id)) - uint64_t(p.first);  // below the first: huge
  return int64_t(std::min(local, uint64_t(p.experts)));
}

// A stable counting sort. The slots are cut into `chunks`; next[chunk][group] is first how many slots the chunk has of
// the group, then the place of the next of them. Where the cuts are does not show in the result.
void sort_slots(const sort::Params& p, const int32_t* ids, int64_t chunks, int32_t* order, int32_t* offsets) {
  const int64_t groups = p.experts + 1, size = (p.slots + chunks - 1) / chunks;
  std::vector<int32_t> next(chunks * groups);
  const auto in_chunks = [&](auto f) {
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        int32_t* mine = next.data() + c * groups;
        for (int64_t i = c * size; i < std::min(p.slots, (c + 1) * size); ++i) f(mine[group_of(p, ids[i])], i);
      }
    });
  };
  in_chunks([](int32_t& count, int64_t) { ++count; });
  int32_t place = 0;
  for (int64_t g = 0; g < groups; ++g) {
    offsets[g] = place;  // the last is where the skipped slots begin
    for (int64_t c = 0; c < chunks; ++c) {
      const int32_t count = next[c * groups + g];
      next[c * groups + g] = place;
      place += count;
    }
  }
  in_chunks([order](int32_t& at, int64_t i) { order[at++] = int32_t(i); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_sort(const Tensor& ids, int64_t num_experts, int64_t first_expert) {
  const sort::Params p = sort::check(ids, num_experts, first_expert);
  const Tensor flat = torch::stable::contiguous(ids);
  const Tensor order = torch::stable::new_empty(ids, {p.slots}, ScalarType::Int);
  const Tensor offsets = torch::stable::new_empty(ids, {p.experts + 1}, ScalarType::Int);
  const Tensor active = torch::stable::new_empty(ids, {p.experts}, ScalarType::Int);
  const Tensor num_active = torch::stable::new_empty(ids, {1}, ScalarType::Int);
  auto* bound = static_cast<int32_t*>(offsets.mutable_data_ptr());

  // A chunk has at least as many slots as groups, or the tables would cost more than the slots.
  const int64_t most = p.slots / std::max(kGrain, p.experts);
  const int64_t chunks = std::clamp<int64_t>(most, 1, torch::stable::get_num_threads());
  sort_slots(p, static_cast<const int32_t*>(flat.const_data_ptr()), chunks,
             static_cast<int32_t*>(order.mutable_data_ptr()), bound);
  auto* expert = static_cast<int32_t*>(active.mutable_data_ptr());
  int64_t found = 0;
  for (int64_t e = 0; e < p.experts; ++e) {
    expert[found] = int32_t(e);
    found += bound[e + 1] > bound[e];
  }
  std::fill(expert + found, expert + p.experts, -1);
  *static_cast<int32_t*>(num_active.mutable_data_ptr()) = int32_t(found);
  return {order, offsets, active, num_active};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("moe_sort", TORCH_BOX(&moe_sort)); }
