// What the sm_90 kernels of grouped_linear share: a block that loads and multiplies, rows of x that are gathered into
// its stages, rows of no group.
#pragma once
#include "grouped_activation.h"
#include "grouped_plan.h"
#include "items.cuh"

namespace n3::grouped_linear::sm90 {

using items::Item;

struct Input {
  items::Work work;
  const void* x;           // [m, k] of 16 bits, 16-byte aligned
  const int32_t* offsets;  // [groups + 1]
  const int32_t* gather;   // [rows] or null
  int32_t sharing;         // row r takes row gather[r] / sharing of x: more than 1 where gather names slots of tokens
  int32_t m, rows, k;
};

struct Barriers {
  hopper::Barrier *landed, *empty;  // one per stage; an empty one more for a release of nothing: nobody waits there
};

// What the roles of a block know. `ends`: the offsets, moved into 0 .. rows.
struct Frame {
  char* memory;
  Barriers barriers;
  const int32_t *ends, *before;
  int32_t count;  // of items
};

// The row of x, or -1: nothing is read and zeros are written. What is out of range was not checked on the host.
N3_DEVICE int32_t source_of(const Input& p, int32_t row) {
  int32_t from = p.gather ? p.gather[row] : row;
  if (p.sharing > 1) from /= p.sharing;
  return from < p.m ? from : -1;
}

// By three warps, `thread` of 96: 8 threads for the 128 bytes of a row, 12 rows at a time.
template <typename T, typename S>
N3_DEVICE void load_rows(const Frame& f, const Input& p, int thread) {
  auto* sources = reinterpret_cast<int32_t*>(f.memory + S::kSourcesAt);
  const T* x = static_cast<const T*>(p.x);
  const int piece = thread % 8;
  items::Position<S::kStages> at, done;
  int waiting = 0;
  const auto deliver = [&] {
    hopper::fence_async();
    __syncwarp();
    if (threadIdx.x % 32 == 0) hopper::arrive(f.barriers.landed + done.stage);
    done.next();
    --waiting;
  };
  for (int32_t i = blockIdx.x; i < f.count; i += gridDim.x) {
    const Item item = items::item_at(p.work, f.before, f.ends, i, S::kRows);
    hopper::sync_threads<96>(1);  // nobody needs the sources of the tile before
    for (int row = thread; row < S::kRows; row += 96) {
      sources[row] = row < item.count ? source_of(p, item.first + row) : -1;
    }
    hopper::sync_threads<96>(1);
    for (int k = 0; k < p.k; k += S::kDepth, at.next()) {
      hopper::wait(f.barriers.empty + at.stage, at.parity ^ 1);
#pragma unroll 4
      for (int row = thread / 8; row < S::kRows; row += 12) {
        const int32_t source = sources[row];
#pragma unroll
        for (int block = 0; block < S::kDepth / 64; ++block) {
          const int column = k + 64 * block + 8 * piece;
          const bool valid = column < p.k && source >= 0;
          const T* from = valid ? x + int64_t(source) * p.k + column : x;
          char* to = f.memory + S::rows_at(at.stage, block) + items::swizzled(row * 128 + piece * 16);
          device::copy_async<16>(to, from, valid);
        }
      }
      device::commit_copies();
      if (++waiting > kLag) {
        device::wait_copies<kLag>();
        deliver();
      }
    }
  }
  device::wait_copies<0>();
  while (waiting) deliver();
}

// Zeros in the rows of no group, by the threads that multiply. `outputs`, of a row, is a multiple of 8.
template <typename T>
N3_DEVICE void clear_rows(const Frame& f, const Input& p, void* y, int32_t outputs) {
  const int32_t first = f.ends[0], behind = f.ends[p.work.experts], pieces = outputs / 8;
  const int64_t count = (int64_t(first) + p.rows - behind) * pieces;
  for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i < count; i += int64_t(gridDim.x) * 256) {
    const int64_t row = i / pieces, at = row < first ? row : row - first + behind;
    *reinterpret_cast<uint4*>(static_cast<T*>(y) + at * outputs + i % pieces * 8) = make_uint4(0, 0, 0, 0);
  }
}

// The result of one output, or of a gate and its output.
template <bool kGated>
N3_DEVICE float activated(Activation activation, float h, float gated) {
  if constexpr (kGated) return items::gated(h, gated, activation == Activation::kGelu);
  return activation == Activation::kRelu2 ? items::relu2(h) : h;
}

// A block: two warpgroups that multiply, one whose warp 0 loads weights, by one thread, and whose warps 1 .. 3 load
// rows. kMultiplying and kLoading registers per thread: 504 for three threads are what 168 at the launch give.
template <typename T, typename S, int kMultiplying, int kLoading, typename LoadWeights, typename Multiply>
N3_DEVICE void run_block(const hopper::TensorMap* map, const Input& p, LoadWeights load_weights, Multiply multiply) {
  static_assert(2 * kMultiplying + kLoading <= 504);
  char* memory = hopper::shared_memory();
  auto* barriers = reinterpret_cast<hopper::Barrier*>(memory + S::kBarriersAt);
  auto* ends = reinterpret_cast<int32_t*>(memory + S::kListAt);
  auto* before = reinterpret_cast<int32_t*>(memory + S::kListAt + S::kList);
  if (threadIdx.x == 0) {
    for (int i = 0; i <= S::kStages; ++i) {
      if (i < S::kStages) hopper::init_barrier(barriers + i, 4);  // the copy engine's thread and three warps
      hopper::init_barrier(barriers + S::kStages + i, 8);         // a warp each
    }
    hopper::publish_barriers();
    hopper::prefetch_map(map);
  }
  for (int g = threadIdx.x; g <= p.work.experts; g += items::kThreads) {
    const int32_t end = p.offsets[g];
    ends[g] = end < 0 ? 0 : end > p.rows ? p.rows : end;
  }
  __syncthreads();
  items::count_tiles(p.work.experts, before, reinterpret_cast<int32_t*>(memory + S::kTotalsAt),
                     [ends](int32_t g) { return items::tiles_of(ends, g, S::kRows); });
  const Frame f{memory, {barriers, barriers + S::kStages}, ends, before, items::items_of(p.work, before)};
  const int group = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0), warp = threadIdx.x / 32 % 4;
  if (group == 2) {
    hopper::give_registers<kLoading>();
    if (warp > 0) {
      load_rows<T, S>(f, p, threadIdx.x % 128 - 32);
    } else if (threadIdx.x % 32 == 0) {
      load_weights(f);
    }
  } else {
    hopper::take_registers<kMultiplying>();
    multiply(f, group);
  }
}

}  // namespace n3::grouped_linear::sm90
