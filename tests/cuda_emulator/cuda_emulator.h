// Runs device code on a CPU: blocks one after the other, in ascending or any other order, or some at once; the threads of
// a block as fibers that take turns at barriers.
//
// csrc/common/device.cuh includes this where no CUDA compiler reads it, so that the kernels' own text is compiled. What
// it shows: indices, masks, layouts, the order of sums, missing barriers (threads run in the order given to launch(),
// one up to its barrier before the next starts, and a warp up to a barrier with others before the next), a copy that is
// read before it was waited for (copies are deferred to the wait), divergence at a barrier. What it cannot show: timing,
// finer memory models, what ptxas makes of it.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // one block runs at a time

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }

namespace emulator {

struct Index {
  uint32_t x = 0, y = 0, z = 0;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint32_t index;
  enum { kRunning, kAtWarp, kAtBlock, kAtCluster, kPolling, kDone } state;
  std::function<bool()> ready;                            // what kPolling waits for
  std::vector<std::function<void()>> copies;              // of the open group
  std::deque<std::vector<std::function<void()>>> groups;  // committed, not waited for
};

struct Warp {
  uint32_t value[32];
  const void* row[32];
  uint32_t a[32][4], b[32][2];
};

struct Block {  // or the blocks of a cluster, one after the other in `threads`
  ucontext_t scheduler;
  size_t size = 0;       // threads of one block
  uint32_t first = 0;    // index of the first block
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Thread* running = nullptr;
  const std::function<void()>* body = nullptr;
  bool started = false;  // for bodies that prepare the block
};

inline Block block;
alignas(16) inline char dynamic_shared[227 * 1024];  // of the block that runs
inline Index thread_index, block_index, grid_dim;

[[noreturn]] inline void die(const char* what) {
  std::fprintf(stderr, "cuda_emulator: block %u: %s\n", block_index.x, what);
  std::abort();
}

inline void wait_at(decltype(Thread::state) where) {
  Thread& self = *block.running;
  self.state = where;
  swapcontext(&self.context, &block.scheduler);
}

// For barriers of other kinds: the thread goes on when `ready` says so.
inline void wait_until(std::function<bool()> ready) {
  if (ready()) return;
  block.running->ready = std::move(ready);
  wait_at(Thread::kPolling);
}

inline Warp& warp() { return block.warps[block.running->index / 32]; }
inline uint32_t lane() { return block.running->index % 32; }

inline void entry() {
  (*block.body)();
  block.running->state = Thread::kDone;
  swapcontext(&block.running->context, &block.scheduler);
}

// Opens a barrier whose threads are all there; the threads that have left count as there, as on the device.
inline bool release(size_t begin, size_t end, decltype(Thread::state) where) {
  bool any = false;
  for (size_t i = begin; i < end; ++i) {
    if (block.threads[i].state != where && block.threads[i].state != Thread::kDone) return false;
    any |= block.threads[i].state == where;
  }
  for (size_t i = begin; i < end; ++i) {
    if (block.threads[i].state == where) block.threads[i].state = Thread::kRunning;
  }
  return any;
}

// Of blocks, and of warps: 0 is ascending, others are seeds of a shuffle.
inline std::mt19937_64 shuffle;
inline bool shuffled = false;

inline void order_blocks(uint64_t seed) {
  shuffled = seed != 0;
  shuffle.seed(seed);
}

inline std::vector<size_t> turns(size_t count) {
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t(0));
  if (shuffled) std::shuffle(order.begin(), order.end(), shuffle);
  return order;
}

inline void run_block(bool reversed) {
  const size_t count = block.threads.size();
  std::vector<bool> asleep((count + 31) / 32);
  uint32_t passes = 0;
  for (bool everybody = false;;) {
    if (shuffled && passes++ % 24 == 0) {  // some warps are late: what does not wait for them goes on
      for (size_t w = 0; w < asleep.size(); ++w) asleep[w] = shuffle() % 8 == 0;
    }
    bool progress = false, skipped = false;
    for (const size_t turn : turns(asleep.size())) {  // a warp goes as far as it can before the next one moves
      if (asleep[turn] && !everybody) {
        skipped = true;
        continue;
      }
      const size_t w = 32 * turn;
      const size_t begin = reversed ? (count - 1) / 32 * 32 - w : w, end = std::min(begin + 32, count);
      do {
        for (size_t n = begin; n < end; ++n) {
          Thread& t = block.threads[reversed ? begin + end - 1 - n : n];
          if (t.state == Thread::kPolling && t.ready()) t.state = Thread::kRunning;
          if (t.state != Thread::kRunning) continue;
          progress = true;
          block.running = &t;
          thread_index.x = uint32_t(t.index % block.size);
          block_index.x = uint32_t(block.first + t.index / block.size);
          swapcontext(&block.scheduler, &t.context);
        }
      } while (release(begin, end, Thread::kAtWarp));
    }
    for (size_t b = 0; b < count; b += block.size) progress |= release(b, b + block.size, Thread::kAtBlock);
    progress |= release(0, count, Thread::kAtCluster);
    everybody = !progress;
    if (progress || skipped) continue;
    for (const Thread& t : block.threads) {
      if (t.state != Thread::kDone) die("threads wait at different barriers");
    }
    return;
  }
}

// kernel<<<blocks, threads>>>() in clusters of `cluster` blocks, `body` being the call; or without clusters, so many at
// once. Threads take their turns in ascending or descending order.
inline void launch(int64_t blocks, int threads, bool reversed, const std::function<void()>& body, int cluster = 1) {
  constexpr size_t kStack = 256 * 1024;
  block.body = &body;
  block.size = threads;
  grid_dim.x = uint32_t(blocks);
  for (const size_t turn : turns(size_t((blocks + cluster - 1) / cluster))) {
    const int64_t b = int64_t(turn) * cluster;
    const int count = threads * int(std::min<int64_t>(cluster, blocks - b));
    block.threads.resize(count);
    block.warps.assign((count + 31) / 32, {});
    block.first = block_index.x = uint32_t(b);
    block.started = false;
    for (int i = 0; i < count; ++i) {
      Thread& t = block.threads[i];
      if (!t.stack) t.stack.reset(new char[kStack]);
      t.index = uint32_t(i);
      t.state = Thread::kRunning;
      t.copies.clear();
      t.groups.clear();
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.get();
      t.context.uc_stack.ss_size = kStack;
      t.context.uc_link = nullptr;
      makecontext(&t.context, entry, 0);
    }
    run_block(reversed);
  }
}

}  // namespace emulator

#define threadIdx ::emulator::thread_index
#define blockIdx ::emulator::block_index
#define gridDim ::emulator::grid_dim

inline void __syncthreads() { emulator::wait_at(emulator::Thread::kAtBlock); }

template <typename T>
T __shfl_xor_sync(uint32_t, T v, int mask) {
  static_assert(sizeof(T) == 4);
  std::memcpy(&emulator::warp().value[emulator::lane()], &v, 4);
  emulator::wait_at(emulator::Thread::kAtWarp);
  T other;
  std::memcpy(&other, &emulator::warp().value[emulator::lane() ^ mask], 4);
  emulator::wait_at(emulator::Thread::kAtWarp);
  return other;
}

namespace n3::device {

inline void emulate_copy(void* to, const void* from, int bytes, bool valid) {
  if (uintptr_t(to) % bytes || (valid && uintptr_t(from) % bytes)) emulator::die("a copy is not aligned");
  emulator::block.running->copies.push_back([=] {
    if (valid) {
      std::memcpy(to, from, bytes);
    } else {
      std::memset(to, 0, bytes);
    }
  });
}

inline void emulate_commit() {
  emulator::Thread& t = *emulator::block.running;
  t.groups.push_back(std::move(t.copies));
  t.copies.clear();
}

inline void emulate_wait(size_t pending) {
  emulator::Thread& t = *emulator::block.running;
  for (; t.groups.size() > pending; t.groups.pop_front()) {
    for (const auto& copy : t.groups.front()) copy();
  }
}

inline void emulate_load_matrices(const void* row, uint32_t (&d)[4]) {
  if (uintptr_t(row) % 16) emulator::die("a row of a matrix is not aligned");
  emulator::Warp& warp = emulator::warp();
  const uint32_t lane = emulator::lane();
  warp.row[lane] = row;
  emulator::wait_at(emulator::Thread::kAtWarp);
  for (int i = 0; i < 4; ++i) std::memcpy(&d[i], static_cast<const char*>(warp.row[8 * i + lane / 4]) + lane % 4 * 4, 4);
  emulator::wait_at(emulator::Thread::kAtWarp);
}

// Products are exact in double; the sum of 16 rounds once. The device's sum differs in its last bits.
template <typename ToFloat>
void emulate_mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], ToFloat to_float) {
  emulator::Warp& warp = emulator::warp();
  const uint32_t lane = emulator::lane(), g = lane / 4, t = lane % 4;
  std::memcpy(warp.a[lane], a, sizeof a);
  std::memcpy(warp.b[lane], b, sizeof b);
  emulator::wait_at(emulator::Thread::kAtWarp);
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t row = g + i / 2 * 8, col = 2 * t + i % 2;
    double sum = c[i];
    for (uint32_t k = 0; k < 16; ++k) {
      const uint32_t half = k / 8, holder = k % 8 / 2, shift = k % 2 * 16;
      const uint32_t av = warp.a[row % 8 * 4 + holder][2 * half + row / 8], bv = warp.b[col * 4 + holder][half];
      sum += double(to_float(uint16_t(av >> shift))) * double(to_float(uint16_t(bv >> shift)));
    }
    c[i] = float(sum);
  }
  emulator::wait_at(emulator::Thread::kAtWarp);
}

}  // namespace n3::device
