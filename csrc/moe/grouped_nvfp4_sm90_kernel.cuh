// grouped_linear with NVFP4 weights on sm_90a: y^T = W x^T in tiles of 256 rows of the weights and 128 or 64 rows of x,
// k in steps of 128. The frame is that of dense weights; operand a is decoded in registers, operand b is rows of x.
//
// A row's bits depend on nothing but the row: its products are the same in every tile, in the same order.
#pragma once
#include "grouped_frame.cuh"
#include "grouped_nvfp4_plan.h"
#include "nvfp4_codes.cuh"

namespace n3::grouped_linear::sm90 {

struct PackedProblem {
  Input in;                  // x in order: k is a multiple of 128
  nvfp4::Scales scales;
  const float* row_scale;    // [rows] or null
  const int32_t* targets;    // kSlots: the rows of y
  void* y;
  int32_t pitch;             // from row to row of codes, in pairs of bytes
  int32_t blocks;            // of 16 k that the weights have
  int32_t outputs;           // rows of a group's weights, gated half of them
  Activation activation;
};

template <bool kGated>
constexpr int kTileOutputs = kGated ? kPiece : kOutputs;

N3_DEVICE int32_t first_row(const PackedProblem& p, bool gated, const Item& item, int piece) {
  return gated ? piece * p.outputs + item.first_range * kPiece : (2 * item.first_range + piece) * kPiece;
}

// Codes, by one thread. A map's row is two rows of the matrix: so it begins at a multiple of 16 bytes whatever the
// number of scale blocks.
template <bool kGated, int kRows>
N3_DEVICE void load_codes(const Frame& f, const PackedProblem& p, const hopper::TensorMap* map) {
  items::Position<Packed<kRows>::kStages> at;
  for (int32_t i = blockIdx.x; i < f.count; i += gridDim.x) {
    const Item item = items::item_at(p.in.work, f.before, f.ends, i, kRows);
    for (int k = 0; k < p.in.k; k += kPiece, at.next()) {
      hopper::wait(f.barriers.empty + at.stage, at.parity ^ 1);
      hopper::arrive_expecting(f.barriers.landed + at.stage, Packed<kRows>::kWeights);
#pragma unroll
      for (int box = 0; box < 4; ++box) {
        char* to = f.memory + Packed<kRows>::weights_at(at.stage) + box * kBox;
        hopper::load_tile(to, map, f.barriers.landed + at.stage, box % 2 * p.pitch + k / 4,
                          first_row(p, kGated, item, box / 2) / 2, item.expert, 0);
      }
    }
  }
}

// A thread's rows of a tile: [the product][row g or g + 8 of operand a].
struct Own {
  int codes[2], next_codes;      // bytes in a stage, of the first product; to the second
  int32_t rows[2], next_rows;    // of the group's weights
  int32_t limit[2];              // behind which, of each product, there are none

  template <bool kGated, To kTo>
  N3_DEVICE static Own of(const PackedProblem& p, const Item& item, int which) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, piece = kGated ? 0 : which;
    const int part = kGated ? which : 0;
    Own o;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(kTo, part, warp, lane / 4, half);
      o.codes[half] = piece * 2 * kBox + codes_at(row, lane % 4);
      o.rows[half] = first_row(p, kGated, item, piece) + row;
    }
    // The second product's rows are those of the other piece, or of this one's other part.
    o.next_codes = kGated ? 2 * kBox : kTo == To::kOrdered ? 64 : 32 * 64;
    o.next_rows = kGated ? p.outputs : kTo == To::kOrdered ? 2 : 64;
    o.limit[0] = p.outputs, o.limit[1] = kGated ? 2 * p.outputs : p.outputs;
    return o;
  }
};

// The scales of a thread's two blocks in the 128 k from block `first` on, of each product and row: two bytes. What lies
// behind a matrix has scales of zero, never NaN.
N3_DEVICE void fetch_scales(const PackedProblem& p, const uint8_t* group, const Own& own, int first,
                            uint32_t (&bytes)[2][2]) {
  const int block = first + threadIdx.x % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int32_t row = own.rows[half] + h * own.next_rows;
      const uint8_t* from = group + row * p.scales.row_stride + block;
      const bool inside = row < own.limit[h];
      const uint32_t low = inside && block < p.blocks ? from[0] : 0;
      const uint32_t high = inside && block + 1 < p.blocks ? from[1] : 0;
      bytes[h][half] = low | high << 8;
    }
  }
}

// d += 128 k of both products. Operand a has two sets of registers: one is decoded while the products of the other run,
// which only those before that must have left. `begun` is called when the products before these have ended.
template <typename T, int kRows, typename Begun>
N3_DEVICE void multiply_piece(float (&d)[2][kRows / 2], uint32_t (&a)[2][2][4], const nvfp4::Piece (&pieces)[2],
                              const char* rows, bool adds, Begun begun) {
  const auto step = [&](auto constant) {
    constexpr int kStep = decltype(constant)::value;
    uint32_t(&operands)[2][4] = a[kStep % 2];
    nvfp4::decode<T, kStep>(pieces[0], operands[0]);
    nvfp4::decode<T, kStep>(pieces[1], operands[1]);
    hopper::fence_products();
    const uint64_t b = items::elements_at(rows + kStep / 4 * Packed<kRows>::kBlock, kStep % 4);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      hopper::Product<T, kRows>::template registers<hopper::Major::kK>(d[h], operands[h], b, adds || kStep > 0);
    }
    hopper::commit_products();
    hopper::wait_products<1>();
    if constexpr (kStep == 0) begun();
  };
  step(std::integral_constant<int, 0>{});
  step(std::integral_constant<int, 1>{});
  step(std::integral_constant<int, 2>{});
  step(std::integral_constant<int, 3>{});
  step(std::integral_constant<int, 4>{});
  step(std::integral_constant<int, 5>{});
  step(std::integral_constant<int, 6>{});
  step(std::integral_constant<int, 7>{});
}

// Results of a warpgroup: of one piece's 128 rows, or of its half of the gated ones.
template <typename T, bool kGated, To kTo, int kRows>
N3_DEVICE void store_tile(const PackedProblem& p, const float (&d)[2][kRows / 2], const Item& item, int which,
                          float rest) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int piece = item.first_range * kTileOutputs<kGated> + (kGated ? 0 : which * kPiece);
#pragma unroll
  for (int h = 0; h < (kGated ? 1 : 2); ++h) {
    const int part = kGated ? which : h, row = row_of(kTo, part, warp, lane / 4, 0);
    const int place = piece + place_of(kTo, part, warp, lane / 4);
    const bool inside[2] = {piece + row < p.outputs, piece + row_of(kTo, part, warp, lane / 4, 1) < p.outputs};
    if (kTo != To::kOrdered && !inside[0]) continue;
#pragma unroll
    for (int j = 0; j < kRows / 4; ++j) {
      const int n = 8 * (j / 2) + lane % 4 * 2 + j % 2, at = j / 2 * 4 + j % 2;
      if (n >= item.count) continue;
      const int32_t r = item.first + n;
      const auto result = [&](int half) {
        const float v = nvfp4::finished(d[h][at + 2 * half], rest);
        return activated<kGated>(p.activation, v, kGated ? nvfp4::finished(d[1][at + 2 * half], rest) : 0.f);
      };
      if constexpr (kTo == To::kSlots) {
        float* to = static_cast<float*>(p.y) + int64_t(p.targets[r]) * p.outputs + place;
        *reinterpret_cast<float2*>(to) = float2{result(0), result(1)};
      } else if constexpr (kTo == To::kOrdered) {
        T* to = static_cast<T*>(p.y) + r * ordered(p.outputs) + place;
        *reinterpret_cast<uint32_t*>(to) = device::pack<T>(inside[0] ? result(0) : 0.f, inside[1] ? result(1) : 0.f);
      } else {
        const bool empty = source_of(p.in, r) < 0;
        const float scale = p.row_scale && !empty ? p.row_scale[r] : 1.f;
        T* to = static_cast<T*>(p.y) + int64_t(r) * p.outputs + place;
        *reinterpret_cast<uint32_t*>(to) = empty ? 0 : device::pack<T>(result(0) * scale, result(1) * scale);
      }
    }
  }
}

template <typename T, bool kGated, To kTo, int kRows>
N3_DEVICE void multiply_tile(const Frame& f, const PackedProblem& p, const Item& item, int which,
                             items::Position<Packed<kRows>::kStages>& at) {
  const Own own = Own::of<kGated, kTo>(p, item, which);
  const nvfp4::Global global = nvfp4::global_for<T>(p.scales.global[item.expert]);
  const uint8_t* group = p.scales.data + item.expert * p.scales.expert_stride;
  float d[2][kRows / 2];
  uint32_t bytes[2][2], a[2][2][4];
  int last = Packed<kRows>::kStages;  // of nothing: a condition where it is released would serialise the products
  fetch_scales(p, group, own, 0, bytes);
  for (int k = 0; k < p.in.k; k += kPiece, at.next()) {
    hopper::wait(f.barriers.landed + at.stage, at.parity);
    const char* weights = f.memory + Packed<kRows>::weights_at(at.stage);
    nvfp4::Piece pieces[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        pieces[h].codes[half] = *reinterpret_cast<const uint4*>(weights + own.codes[half] + h * own.next_codes);
        pieces[h].factors[half] = nvfp4::factors_of<T>(bytes[h][half], global.factor);
      }
    }
    fetch_scales(p, group, own, (k + kPiece) / nvfp4::kPerScale, bytes);
    multiply_piece<T, kRows>(d, a, pieces, f.memory + Packed<kRows>::rows_at(at.stage, 0), k > 0, [&] {
      items::release(f.barriers.empty + last);
    });
    last = at.stage;
  }
  hopper::wait_products<0>();
  hopper::pin(d[0]);
  hopper::pin(d[1]);
  items::release(f.barriers.empty + last);
  store_tile<T, kGated, kTo, kRows>(p, d, item, which, global.rest);
}

template <typename T, bool kGated, To kTo, int kRows>
N3_DEVICE void multiply(const Frame& f, const PackedProblem& p, int which) {
  items::Position<Packed<kRows>::kStages> at;
  for (int32_t i = blockIdx.x; i < f.count; i += gridDim.x) {
    const Item item = items::item_at(p.in.work, f.before, f.ends, i, kRows);
    const int first = kGated ? (kTo == To::kOrdered ? 0 : 64 * which) : kPiece * which;
    if (item.first_range * kTileOutputs<kGated> + first >= p.outputs) {  // no rows: keeps step
      for (int k = 0; k < p.in.k; k += kPiece, at.next()) {
        hopper::wait(f.barriers.landed + at.stage, at.parity);
        items::release(f.barriers.empty + at.stage);
      }
    } else {
      multiply_tile<T, kGated, kTo, kRows>(f, p, item, which, at);
    }
  }
}

//   grid  plan().blocks, at most one per multiprocessor     block  kThreads     smem  Packed<kRows>, dynamic
template <typename T, bool kGated, To kTo, int kRows>
__global__ __launch_bounds__(items::kThreads, 1) void tensor_grouped_nvfp4_kernel_sm90(
    const __grid_constant__ hopper::TensorMap map, const __grid_constant__ PackedProblem p) {
  run_block<T, Packed<kRows>, 224, 56>(
      &map, p.in, [&](const Frame& f) { load_codes<kGated, kRows>(f, p, &map); },
      [&](const Frame& f, int which) {
        multiply<T, kGated, kTo, kRows>(f, p, which);
        if constexpr (kTo == To::kRows) clear_rows<T>(f, p.in, p.y, p.outputs);
      });
}

}  // namespace n3::grouped_linear::sm90
