// The meaning of csrc/common/hopper.cuh on a CPU: barriers in shared memory, tile copies, warpgroup products.
//
// Copies and products happen either when they are issued or, lazily, not before somebody waits for them: a kernel that
// reads a result too early is wrong when that is lazy, one that overwrites an operand too early when the operand's user
// is lazy and the writer is not. Swizzles act on the bits of an
// address in shared memory, by the rules that CUTLASS states for wgmma descriptors (canonical layouts) and for TMA. Not
// shown: missing fences between ordinary and asynchronous accesses, setmaxnreg, the order of sums inside a product.
#pragma once
#include <map>
#include <utility>

#include "cuda_emulator.h"

#define __grid_constant__

struct float2 {
  float x, y;
};

namespace emulator {

constexpr int kSharedBytes = 232448, kMostBlocks = 8;  // of a block; of a cluster
alignas(1024) inline char shared_memory[kMostBlocks * kSharedBytes];

// Of the block that runs, its place in its cluster; where its shared memory begins.
inline int cluster_rank() { return int(block.running->index / block.size); }
inline char* own_shared_memory() { return shared_memory + cluster_rank() * kSharedBytes; }
inline bool lazy_copies = false, lazy_products = false;

struct TensorMap {
  const char* base;
  int64_t sizes[4], strides[4];  // strides in bytes; the innermost is 2
  int box[4];
  int row_bytes;  // of the swizzle: the length of the box's innermost side
};

struct SharedBarrier {
  uint32_t arrivals = 0, arrived = 0, phase = 0;
  int64_t bytes = 0;
  std::vector<std::function<void()>> copies;
};
struct Named {
  int arrived = 0, generation = 0;
};
struct Products {
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> groups;
};
inline std::map<const void*, SharedBarrier> barriers;
inline Named named[kMostBlocks][16];
inline std::vector<Products> products;

inline int swizzle(int address, int row_bytes) { return address ^ ((address >> 7 & (row_bytes / 16 - 1)) << 4); }

inline void complete(SharedBarrier& b) {
  if (b.arrived != b.arrivals || b.bytes) return;
  b.arrived = 0;
  ++b.phase;
}

inline SharedBarrier& barrier_at(const void* p) {
  const auto found = barriers.find(p);
  if (found == barriers.end()) die("a barrier was not initialised");
  return found->second;
}

inline void init_barrier(const void* p, uint32_t arrivals) { barriers[p] = {arrivals}; }

inline void arrive(const void* p, int64_t bytes) {
  SharedBarrier& b = barrier_at(p);
  if (b.arrived == b.arrivals) die("more arrivals than a phase has");
  b.bytes += bytes;
  ++b.arrived;
  complete(b);
}

inline void wait(const void* p, uint32_t parity) {
  SharedBarrier& b = barrier_at(p);
  wait_until([&b, parity] {
    std::vector<std::function<void()>> copies = std::move(b.copies);
    b.copies.clear();
    for (const auto& copy : copies) copy();
    return (b.phase & 1) != parity;
  });
}

inline void sync_named(int id, int threads) {
  Named& n = named[cluster_rank()][id];
  const int generation = n.generation;
  if (++n.arrived == threads) {
    n.arrived = 0;
    ++n.generation;
  }
  wait_until([&n, generation] { return n.generation != generation; });
}

inline void load_tile(void* to, const TensorMap& map, const void* barrier, int c0, int c1, int c2, int c3) {
  SharedBarrier& b = barrier_at(barrier);
  const int start = int(static_cast<char*>(to) - shared_memory);
  if (start % 1024 || map.box[0] * 2 != map.row_bytes) die("a tile is not aligned, or its rows are not the swizzle's");
  const auto copy = [=, &b, &map] {
    int linear = start;
    for (int i3 = c3; i3 < c3 + map.box[3]; ++i3) {
      for (int i2 = c2; i2 < c2 + map.box[2]; ++i2) {
        for (int i1 = c1; i1 < c1 + map.box[1]; ++i1) {
          for (int i0 = c0; i0 < c0 + map.box[0]; ++i0, linear += 2) {
            const int64_t at[4] = {i0, i1, i2, i3};
            const char* from = map.base;
            bool inside = true;
            for (int d = 0; d < 4; ++d) {
              inside = inside && at[d] >= 0 && at[d] < map.sizes[d];
              from += at[d] * map.strides[d];
            }
            char* place = shared_memory + swizzle(linear, map.row_bytes);
            inside ? std::memcpy(place, from, 2) : std::memset(place, 0, 2);
          }
        }
      }
    }
    b.bytes -= linear - start;
    complete(b);
  };
  lazy_copies ? b.copies.push_back(copy) : copy();
}

// Where a test names tensors, prefetches lie in one of them.
inline std::vector<std::pair<const char*, const char*>> prefetchable;

inline void prefetch(const void* p, uint32_t bytes) {
  if (uintptr_t(p) % 16 || bytes % 16) die("a prefetch is not aligned");
  const char *begin = static_cast<const char*>(p), *end = begin + bytes;
  bool inside = prefetchable.empty();
  for (const auto& [first, behind] : prefetchable) inside = inside || (begin >= first && end <= behind);
  if (!inside) die("a prefetch lies outside");
}

// ---- products

struct ProductOperand {
  bool in_registers, along_mn;
  uint64_t descriptor;
  uint16_t rows[2][16];  // in registers: what this thread needs of a
};

// Element (mn, k) of an operand in shared memory.
inline uint16_t element(uint64_t descriptor, bool along_mn, int mn, int k) {
  const int type = int(descriptor >> 62), row_bytes = type == 1 ? 128 : type == 3 ? 32 : 0, columns = row_bytes / 2;
  if (!row_bytes) die("a descriptor's swizzle is not one of those in use");
  const int start = int(descriptor & 0x3fff) << 4, next_block = int(descriptor >> 16 & 0x3fff) << 4,
            next_rows = int(descriptor >> 32 & 0x3fff) << 4;
  const int at = along_mn ? start + mn / columns * next_block + mn % columns * 2 + k / 8 * next_rows + k % 8 * row_bytes
                          : start + mn / 8 * next_rows + mn % 8 * row_bytes + k * 2;
  uint16_t bits;
  std::memcpy(&bits, own_shared_memory() + swizzle(at, row_bytes), 2);
  return bits;
}

inline ProductOperand operand(uint64_t descriptor, bool along_mn) { return {false, along_mn, descriptor, {}}; }

inline ProductOperand operand(const uint32_t (&a)[4]) {
  ProductOperand o{true, false, 0, {}};
  std::memcpy(warp().a[lane()], a, sizeof a);
  wait_at(Thread::kAtWarp);
  for (int half = 0; half < 2; ++half) {
    for (int k = 0; k < 16; ++k) {
      const uint32_t word = warp().a[lane() / 4 * 4 + k % 8 / 2][half + k / 8 * 2];
      o.rows[half][k] = uint16_t(word >> k % 2 * 16);
    }
  }
  wait_at(Thread::kAtWarp);
  return o;
}

template <typename T>
float to_float(uint16_t bits);

// Products are exact in double; the sum of 16 and d rounds once. The device's sum differs in its last bits.
template <typename T, int kN>
void product(float (&d)[kN / 2], const ProductOperand& a, uint64_t b, bool b_along_mn, bool accumulate) {
  const int thread = int(block.running->index % block.size) % 128, g = thread % 32 / 4, t = thread % 4;
  const auto run = [=, &d] {
    double left[2][16];
    for (int half = 0; half < 2; ++half) {
      for (int k = 0; k < 16; ++k) {
        const int row = thread / 32 * 16 + g + 8 * half;
        left[half][k] = to_float<T>(a.in_registers ? a.rows[half][k] : element(a.descriptor, a.along_mn, row, k));
      }
    }
    for (int j = 0; j < kN / 8; ++j) {
      for (int e = 0; e < 2; ++e) {
        double sums[2];
        for (int half = 0; half < 2; ++half) sums[half] = accumulate ? double(d[4 * j + 2 * half + e]) : 0.0;
        for (int k = 0; k < 16; ++k) {
          const double right = to_float<T>(element(b, b_along_mn, 8 * j + 2 * t + e, k));
          for (int half = 0; half < 2; ++half) sums[half] += left[half][k] * right;
        }
        for (int half = 0; half < 2; ++half) d[4 * j + 2 * half + e] = float(sums[half]);
      }
    }
  };
  lazy_products ? products[block.running->index].open.push_back(run) : run();
}

inline void commit_products() {
  Products& p = products[block.running->index];
  p.groups.push_back(std::move(p.open));
  p.open.clear();
}

inline void wait_products(size_t pending) {
  Products& p = products[block.running->index];
  if (lazy_products) {  // the others first
    bool waited = false;
    wait_until([waited]() mutable { return std::exchange(waited, true); });
  }
  for (; p.groups.size() > pending; p.groups.pop_front()) {
    for (const auto& run : p.groups.front()) run();
  }
}

// Whether every other thread of this one's block has ended.
inline bool last_of_block() {
  const size_t first = cluster_rank() * block.size, own = block.running->index;
  for (size_t i = first; i < first + block.size; ++i) {
    if (i != own && block.threads[i].state != Thread::kDone) return false;
  }
  return true;
}

// As launch(), each block with new barriers and with shared memory full of NaN, as which it also ends: other blocks of
// its cluster must not read it any more.
inline void launch_hopper(int64_t blocks, int threads, bool reversed, const std::function<void()>& body,
                          int cluster = 1) {
  products.resize(size_t(threads) * cluster);
  launch(blocks, threads, reversed, [&] {
    if (!block.started) {
      block.started = true;
      barriers.clear();
      std::memset(shared_memory, 0xff, size_t(cluster) * kSharedBytes);
      for (Products& p : products) p = {};
      for (auto& of_block : named) std::fill(std::begin(of_block), std::end(of_block), Named{});
    }
    body();
    if (cluster > 1 && last_of_block()) std::memset(own_shared_memory(), 0xff, kSharedBytes);
  }, cluster);
}

}  // namespace emulator

inline void __syncwarp() { emulator::wait_at(emulator::Thread::kAtWarp); }

// The value that lane `from(lane)` holds.
template <typename T, typename From>
T emulate_shuffle(T v, From from) {
  static_assert(sizeof(T) == 4);
  std::memcpy(&emulator::warp().value[emulator::lane()], &v, 4);
  emulator::wait_at(emulator::Thread::kAtWarp);
  T other;
  std::memcpy(&other, &emulator::warp().value[from(int(emulator::lane()))], 4);
  emulator::wait_at(emulator::Thread::kAtWarp);
  return other;
}

template <typename T>
T __shfl_up_sync(uint32_t, T v, int by) {
  return emulate_shuffle(v, [by](int lane) { return lane < by ? lane : lane - by; });
}

template <typename T>
T __shfl_sync(uint32_t, T v, int from) {
  return emulate_shuffle(v, [from](int) { return from; });
}

inline uint32_t __ballot_sync(uint32_t, bool vote) {
  emulator::warp().value[emulator::lane()] = vote;
  emulator::wait_at(emulator::Thread::kAtWarp);
  uint32_t votes = 0;
  for (int i = 0; i < 32; ++i) votes |= emulator::warp().value[i] << i;
  emulator::wait_at(emulator::Thread::kAtWarp);
  return votes;
}

inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float v) { return std::exp(v); }
inline int __ffs(uint32_t v) { return __builtin_ffs(int(v)); }
