// grouped_linear on sm_90: tiles of 128 rows of a group and 256 outputs, k in steps of 64. Rows of x are gathered by
// copies of 16 bytes, weights come by the copy engine, two warpgroups multiply 64 rows each.
//
// A row's bits depend on nothing but the row: every tile is the same products in the same order.
#pragma once
#include "grouped_plan.h"
#include "items.cuh"

namespace n3::grouped_linear::sm90 {

using items::Item;

struct Problem {
  items::Work work;
  const void* x;           // [m, k], 16-byte aligned
  const int32_t* offsets;  // [groups + 1]
  const int32_t* gather;   // [rows] or null
  const float* row_scale;  // [rows] or null
  void* y;                 // [rows, n]
  int32_t m, rows, n, k;
  bool relu2;
};

struct Barriers {
  hopper::Barrier *landed, *empty;
};

// The row of x, or -1: nothing is read and zeros are written. What is out of range was not checked on the host.
N3_DEVICE int32_t source_of(const Problem& p, int32_t row) {
  const int32_t from = p.gather ? p.gather[row] : row;
  return from < p.m ? from : -1;
}

// `ends`, here and below: the offsets, moved into 0 .. rows.
N3_DEVICE void load_weights(char* memory, const Barriers& b, const Problem& p, const int32_t* ends,
                            const int32_t* before, int32_t count, const hopper::TensorMap* map) {
  items::Position<kStages> at;
  for (int32_t i = blockIdx.x; i < count; i += gridDim.x) {
    const Item item = items::item_at(p.work, before, ends, i, kRows);
    for (int k = 0; k < p.k; k += kDepth, at.next()) {
      hopper::wait(b.empty + at.stage, at.parity ^ 1);
      hopper::arrive_expecting(b.landed + at.stage, Shared::kWeights);
      for (int n = 0; n < kOutputs; n += 64) {
        hopper::load_tile(memory + Shared::weights_at(at.stage) + n * 128, map, b.landed + at.stage, k,
                          item.first_range * kOutputs + n, item.expert, 0);
      }
    }
  }
}

// By three warps, `thread` of 96: 8 threads for the 128 bytes of a row, 12 rows at a time.
template <typename T>
N3_DEVICE void load_rows(char* memory, const Barriers& b, const Problem& p, const int32_t* ends, const int32_t* before,
                         int32_t count, int thread) {
  auto* sources = reinterpret_cast<int32_t*>(memory + Shared::kSourcesAt);
  const T* x = static_cast<const T*>(p.x);
  const int piece = thread % 8;
  items::Position<kStages> at, done;
  int waiting = 0;
  const auto deliver = [&] {
    hopper::fence_async();
    __syncwarp();
    if (threadIdx.x % 32 == 0) hopper::arrive(b.landed + done.stage);
    done.next();
    --waiting;
  };
  for (int32_t i = blockIdx.x; i < count; i += gridDim.x) {
    const Item item = items::item_at(p.work, before, ends, i, kRows);
    hopper::sync_threads<96>(1);  // nobody needs the sources of the tile before
    for (int row = thread; row < kRows; row += 96) {
      sources[row] = row < item.count ? source_of(p, item.first + row) : -1;
    }
    hopper::sync_threads<96>(1);
    for (int k = 0; k < p.k; k += kDepth, at.next()) {
      const bool inside = k + 8 * piece < p.k;
      char* to = memory + Shared::rows_at(at.stage);
      hopper::wait(b.empty + at.stage, at.parity ^ 1);
#pragma unroll 4
      for (int row = thread / 8; row < kRows; row += 12) {
        const int32_t source = sources[row];
        const bool valid = inside && source >= 0;
        const T* from = valid ? x + int64_t(source) * p.k + k + 8 * piece : x;
        device::copy_async<16>(to + items::swizzled(row * 128 + piece * 16), from, valid);
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

// The results of 64 rows and 128 outputs, `first` and `output` being those of the tile.
template <typename T>
N3_DEVICE void store_outputs(const Problem& p, const float (&d)[64], const Item& item, int which, int output) {
  const int lane = threadIdx.x % 32, first = 64 * which + threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = first + 8 * half;
    if (at >= item.count) continue;
    const int32_t row = item.first + at;
    const bool empty = source_of(p, row) < 0;
    const float scale = p.row_scale && !empty ? p.row_scale[row] : 1.f;
    T* to = static_cast<T*>(p.y) + int64_t(row) * p.n;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const int column = output + 8 * j + lane % 4 * 2;
      if (column >= p.n) continue;
      float v[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        v[e] = d[4 * j + 2 * half + e];
        if (p.relu2) v[e] = items::relu2(v[e]);
        v[e] = v[e] * scale;
      }
      *reinterpret_cast<uint32_t*>(to + column) = device::pack<T>(v[0], v[1]);
    }
  }
}

template <typename T>
N3_DEVICE void multiply(const char* memory, const Barriers& b, const Problem& p, const int32_t* ends,
                        const int32_t* before, int32_t count, int which) {
  using Products = hopper::Product<T, 128>;
  constexpr hopper::Major kK = hopper::Major::kK;
  items::Position<kStages> at;
  for (int32_t i = blockIdx.x; i < count; i += gridDim.x) {
    const Item item = items::item_at(p.work, before, ends, i, kRows);
    float d[2][64];
    int last = 0;
    for (int k = 0; k < p.k; k += kDepth, at.next()) {
      hopper::wait(b.landed + at.stage, at.parity);
      const char* rows = memory + Shared::rows_at(at.stage) + which * 64 * 128;
      const char* weights = memory + Shared::weights_at(at.stage);
      hopper::fence_products();
#pragma unroll
      for (int s = 0; s < 4; ++s) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          Products::template shared<kK, kK>(d[h], items::elements_at(rows, s),
                                            items::elements_at(weights + h * 128 * 128, s), k + s > 0);
        }
      }
      hopper::commit_products();
      hopper::wait_products<1>();
      if (k) items::release(b.empty + last);
      last = at.stage;
    }
    hopper::wait_products<0>();
    hopper::pin(d[0]);
    hopper::pin(d[1]);
    items::release(b.empty + last);
#pragma unroll
    for (int h = 0; h < 2; ++h) store_outputs<T>(p, d[h], item, which, item.first_range * kOutputs + 128 * h);
  }
}

// Zeros in the rows of no group, by the threads that multiply. n is a multiple of 8.
template <typename T>
N3_DEVICE void clear_rows(const Problem& p, const int32_t* ends) {
  const int32_t first = ends[0], behind = ends[p.work.experts], pieces = p.n / 8;
  const int64_t count = (int64_t(first) + p.rows - behind) * pieces;
  for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i < count; i += int64_t(gridDim.x) * 256) {
    const int64_t row = i / pieces, at = row < first ? row : row - first + behind;
    *reinterpret_cast<uint4*>(static_cast<T*>(p.y) + at * p.n + i % pieces * 8) = make_uint4(0, 0, 0, 0);
  }
}

//   grid  plan().blocks, at most one per multiprocessor     block  two warpgroups that multiply, one whose warp 0 loads
//   weights and whose warps 1 .. 3 load rows     smem  Shared, dynamic
// 216 and 72 registers per thread are 504 for three threads, what 168 at the launch give.
template <typename T>
__global__ __launch_bounds__(items::kThreads, 1) void tensor_grouped_kernel_sm90(
    const __grid_constant__ hopper::TensorMap map, const __grid_constant__ Problem p) {
  char* memory = hopper::shared_memory();
  auto* barriers = reinterpret_cast<hopper::Barrier*>(memory + Shared::kBarriersAt);
  const Barriers b{barriers, barriers + kStages};
  auto* ends = reinterpret_cast<int32_t*>(memory + Shared::kListAt);
  auto* before = reinterpret_cast<int32_t*>(memory + Shared::kListAt + Shared::kList);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      hopper::init_barrier(b.landed + i, 4);  // the copy engine's thread and three warps
      hopper::init_barrier(b.empty + i, 8);   // a warp each
    }
    hopper::publish_barriers();
    hopper::prefetch_map(&map);
  }
  for (int g = threadIdx.x; g <= p.work.experts; g += items::kThreads) {
    const int32_t end = p.offsets[g];
    ends[g] = end < 0 ? 0 : end > p.rows ? p.rows : end;
  }
  __syncthreads();
  items::count_tiles(p.work.experts, before, reinterpret_cast<int32_t*>(memory + Shared::kTotalsAt),
                     [ends](int32_t g) { return items::tiles_of(ends, g, kRows); });
  const int32_t count = items::items_of(p.work, before);
  const int group = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0), warp = threadIdx.x / 32 % 4;
  if (group == 2) {
    hopper::give_registers<72>();
    if (warp > 0) {
      load_rows<T>(memory, b, p, ends, before, count, threadIdx.x % 128 - 32);
    } else if (threadIdx.x % 32 == 0) {
      load_weights(memory, b, p, ends, before, count, &map);
    }
  } else {
    hopper::take_registers<216>();
    multiply<T>(memory, b, p, ends, before, count, group);
    clear_rows<T>(p, ends);
  }
}

}  // namespace n3::grouped_linear::sm90
