// Routing and sort under the emulator, with C entries for tests/moe/test_moe_cuda_kernels.py. The grids are those of
// the plans; arguments are the kernels' own structures, which the tests fill in as the launchers do.
#include "cuda_emulator.h"
#include "hopper_emulator.h"

inline int32_t atomicAdd(int32_t* at, int32_t v) { return *at += v, *at - v; }  // one thread runs at a time
inline int __popc(uint32_t v) { return __builtin_popcount(v); }

// f(the values of all lanes), in each.
template <typename F>
uint32_t over_warp(uint32_t v, F f) {
  emulator::warp().value[emulator::lane()] = v;
  emulator::wait_at(emulator::Thread::kAtWarp);
  const uint32_t result = f(emulator::warp().value);
  emulator::wait_at(emulator::Thread::kAtWarp);
  return result;
}

inline uint32_t __reduce_max_sync(uint32_t, uint32_t v) {
  return over_warp(v, [](const uint32_t* all) { return *std::max_element(all, all + 32); });
}

inline uint32_t __match_any_sync(uint32_t, uint32_t v) {
  return over_warp(v, [v](const uint32_t* all) {
    uint32_t lanes = 0;
    for (int i = 0; i < 32; ++i) lanes |= uint32_t(all[i] == v) << i;
    return lanes;
  });
}

#include "moe/route_kernel.cuh"
#include "moe/sort_kernel.cuh"

namespace {

namespace route = n3::moe_route;
namespace sort = n3::moe_sort;

// Calls f with the kernel's element type, 0 to 2 for float, half and bfloat16, and the experts of a lane.
template <typename T, typename F>
void with_lanes(int per_lane, F f) {
  if (per_lane == 4) return f.template operator()<T, 4>();
  if (per_lane == 8) return f.template operator()<T, 8>();
  if (per_lane == 16) return f.template operator()<T, 16>();
  f.template operator()<T, 32>();
}

template <typename F>
void with_kernel(int type, int per_lane, F f) {
  if (type == 0) return with_lanes<float>(per_lane, f);
  if (type == 1) return with_lanes<n3::device::F16>(per_lane, f);
  with_lanes<n3::device::BF16>(per_lane, f);
}

}  // namespace

extern "C" {

void emulate_route(const route::Args* a, int type, bool reversed) {
  const route::Plan plan = route::plan(a->tokens, a->experts);
  with_kernel(type, plan.per_lane, [&]<typename T, int kPer>() {
    emulator::launch(plan.blocks, route::kThreads, reversed, [&] { route::forward_kernel<T, kPer>(*a); });
  });
}

void emulate_route_bwd(const route::BackwardArgs* a, int type, bool reversed) {
  const route::Plan plan = route::plan(a->tokens, a->experts);
  with_kernel(type, plan.per_lane, [&]<typename T, int>() {
    emulator::launch(plan.blocks, route::kThreads, reversed, [&] { route::backward_kernel<T>(*a); });
  });
}

// `table` has room for the plan's; returns whether one block sorted.
bool emulate_sort(const sort::Args* args, int32_t* table, bool reversed) {
  sort::Args a = *args;
  const sort::Plan plan = sort::plan(a.slots, int64_t(a.experts) + 1);
  a.chunks = int32_t(plan.chunks), a.size = int32_t(plan.size);
  std::memset(emulator::dynamic_shared, 0x7f, sizeof emulator::dynamic_shared);
  if (plan.alone) {
    emulator::launch(1, sort::kThreads, reversed, [&] { sort::alone_kernel(a); });
    return true;
  }
  a.table = table;
  const int64_t blocks = (plan.chunks + sort::kWarps - 1) / sort::kWarps;
  emulator::launch(blocks, 32 * sort::kWarps, reversed, [&] { sort::count_kernel(a); });
  emulator::launch(1, sort::kThreads, reversed, [&] { sort::add_kernel(a); });
  emulator::launch(blocks, 32 * sort::kWarps, reversed, [&] { sort::place_kernel(a); });
  return false;
}

int64_t sort_table(int64_t slots, int64_t experts) { return sort::plan(slots, experts + 1).chunks * (experts + 1); }

int64_t size_of_arguments(int which) {
  const size_t sizes[] = {sizeof(route::Args), sizeof(route::BackwardArgs), sizeof(sort::Args)};
  return int64_t(sizes[which]);
}

}  // extern "C"
