// grouped_linear on sm_90: tiles of 128 rows of a group and 256 outputs, k in steps of 64. Rows of x are gathered by
// copies of 16 bytes, weights come by the copy engine, two warpgroups multiply 64 rows each.
//
// A row's bits depend on nothing but the row: every tile is the same products in the same order.
#pragma once
#include "grouped_frame.cuh"

namespace n3::grouped_linear::sm90 {

struct Problem {
  Input in;
  const float* row_scale;  // [rows] or null
  const int32_t* targets;  // kSlots: the rows of y
  void* y;                 // [rows, outputs]
  int32_t outputs;         // n, gated n / 2
  Activation activation;
};

// Gated, the first 128 rows of weights of a tile are gates and the others what they gate.
template <bool kGated>
N3_DEVICE void load_weights(const Frame& f, const Problem& p, const hopper::TensorMap* map) {
  items::Position<Dense::kStages> at;
  for (int32_t i = blockIdx.x; i < f.count; i += gridDim.x) {
    const Item item = items::item_at(p.in.work, f.before, f.ends, i, Dense::kRows);
    for (int k = 0; k < p.in.k; k += Dense::kDepth, at.next()) {
      hopper::wait(f.barriers.empty + at.stage, at.parity ^ 1);
      hopper::arrive_expecting(f.barriers.landed + at.stage, Dense::kWeights);
      for (int n = 0; n < kOutputs; n += 64) {
        const int row = !kGated ? item.first_range * kOutputs + n
                                : n / 128 * p.outputs + item.first_range * (kOutputs / 2) + n % 128;
        hopper::load_tile(f.memory + Dense::weights_at(at.stage) + n * 128, map, f.barriers.landed + at.stage, k, row,
                          item.expert, 0);
      }
    }
  }
}

// The results of 64 rows and 128 outputs from `output` on; d: of them, gated first of the gates.
template <typename T, bool kGated, To kTo>
N3_DEVICE void store_outputs(const Problem& p, const float (&d)[64], const float (&gated)[64], const Item& item,
                             int which, int output) {
  const int lane = threadIdx.x % 32, first = 64 * which + threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = first + 8 * half;
    if (at >= item.count) continue;
    const int32_t row = item.first + at;
    const bool empty = kTo == To::kRows && source_of(p.in, row) < 0;
    const float scale = kTo == To::kRows && p.row_scale && !empty ? p.row_scale[row] : 1.f;
    const int64_t first_place = int64_t(kTo == To::kSlots ? p.targets[row] : row) * p.outputs;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const int column = output + 8 * j + lane % 4 * 2;
      if (column >= p.outputs) continue;
      float v[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int i = 4 * j + 2 * half + e;
        v[e] = empty ? 0.f : activated<kGated>(p.activation, d[i], gated[i]) * scale;
      }
      if constexpr (kTo == To::kSlots) {
        *reinterpret_cast<float2*>(static_cast<float*>(p.y) + first_place + column) = float2{v[0], v[1]};
      } else {
        *reinterpret_cast<uint32_t*>(static_cast<T*>(p.y) + first_place + column) = device::pack<T>(v[0], v[1]);
      }
    }
  }
}

template <typename T, bool kGated, To kTo>
N3_DEVICE void multiply(const Frame& f, const Problem& p, int which) {
  using Products = hopper::Product<T, 128>;
  constexpr hopper::Major kK = hopper::Major::kK;
  items::Position<Dense::kStages> at;
  for (int32_t i = blockIdx.x; i < f.count; i += gridDim.x) {
    const Item item = items::item_at(p.in.work, f.before, f.ends, i, Dense::kRows);
    float d[2][64];
    int last = 0;
    for (int k = 0; k < p.in.k; k += Dense::kDepth, at.next()) {
      hopper::wait(f.barriers.landed + at.stage, at.parity);
      const char* rows = f.memory + Dense::rows_at(at.stage, 0) + which * 64 * 128;
      const char* weights = f.memory + Dense::weights_at(at.stage);
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
      if (k) items::release(f.barriers.empty + last);
      last = at.stage;
    }
    hopper::wait_products<0>();
    hopper::pin(d[0]);
    hopper::pin(d[1]);
    items::release(f.barriers.empty + last);
    if constexpr (kGated) {
      store_outputs<T, true, kTo>(p, d[0], d[1], item, which, item.first_range * (kOutputs / 2));
    } else {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        store_outputs<T, false, kTo>(p, d[h], d[h], item, which, item.first_range * kOutputs + 128 * h);
      }
    }
  }
}

//   grid  plan().blocks, at most one per multiprocessor     block  kThreads     smem  Dense, dynamic
template <typename T, bool kGated, To kTo>
__global__ __launch_bounds__(items::kThreads, 1) void tensor_grouped_kernel_sm90(
    const __grid_constant__ hopper::TensorMap map, const __grid_constant__ Problem p) {
  run_block<T, Dense, 216, 72>(
      &map, p.in, [&](const Frame& f) { load_weights<kGated>(f, p, &map); },
      [&](const Frame& f, int which) {
        multiply<T, kGated, kTo>(f, p, which);
        if constexpr (kTo == To::kRows) clear_rows<T>(f, p.in, p.y, p.outputs);
      });
}

}  // namespace n3::grouped_linear::sm90
