// What moe_experts with NVFP4 weights loads on sm_90a: codes by the copy engine, scales and tokens by threads.
#pragma once
#include "../common/hopper.cuh"
#include "experts_nvfp4_plan.h"
#include "items.cuh"

namespace n3::moe_experts::sm90::nvfp4 {

// e4m3 scales [experts, rows, columns]; strides in bytes.
struct Scales {
  const uint8_t* data;
  int64_t expert_stride, row_stride;
  const float* global;  // [experts]
};

struct Problem {
  Work work;
  const device::BF16* x;   // [tokens, width], 16-byte aligned
  const int32_t* order;    // slots by expert
  const int32_t* offsets;  // [experts + 1]
  float* rows;             // [slots, rows_per_slot, width]
  Scales up, down;
  int32_t up_pitch, down_pitch;  // from row to row of codes, in pairs of bytes
  int32_t width, inner, top_k;
};

// Of a stage: that codes and scales have landed, and that nobody reads it any more; the same of the inputs.
struct Barriers {
  hopper::Barrier *landed, *empty, *inputs_landed, *inputs_empty;
};

struct Unit {
  bool up;
  int32_t expert, row, k;
  int halves;  // of the rows that are wanted: 1 or 2
  int blocks;  // of 16 k that count, 1 to 8: what is behind is zero, or the next range's
};

// Unit u of the step that begins at `chunk`: those of W_up, then those of W_down.
N3_DEVICE Unit unit_at(const Problem& p, int32_t expert, int32_t chunk, int halves, int32_t u) {
  const int32_t ups = (p.width + kUnit - 1) / kUnit;
  const bool up = u < ups;
  const int32_t row = up ? chunk * kChunk : (u - ups) * kUnit, k = up ? u * kUnit : chunk * kChunk;
  const int32_t left = ((up ? p.width : p.inner) - k) / kPerScale, own = up ? 8 : halves * (kChunk / kPerScale);
  return {up, expert, row, k, up ? halves : 2, left < own ? left : own};
}

// Calls visit(unit) for all units of this block, in the order in which they are used, and begin(item, n) before the
// first of the block's n-th item.
template <typename Tile, typename Begin, typename Visit>
N3_DEVICE void walk(const Problem& p, const int32_t* before, int32_t items, Begin begin, Visit visit) {
  for (int32_t i = blockIdx.x; i < items; i += gridDim.x) {
    const Item item = item_at(p.work, before, p.offsets, i, Tile::kTokens);
    begin(item, uint32_t(i - blockIdx.x) / gridDim.x);
    for (int32_t r = item.first_range; r < item.last_range; ++r) {
      const auto end = [&] { return range_at(p.work.chunks, p.work.ranges, hopper::forgotten(r)).end; };
      for (int32_t chunk = range_at(p.work.chunks, p.work.ranges, r).begin; chunk < end(); chunk += 2) {
        const int halves = chunk + 1 < end() ? 2 : 1;
#pragma unroll 1
        for (int32_t u = 0; u < (p.width + kUnit - 1) / kUnit + Tile::kTiles; ++u) {
          visit(unit_at(p, item.expert, chunk, halves, u));
        }
      }
    }
  }
}

// Codes. By one thread. A map's row is two rows of the matrix: so it begins at a multiple of 16 bytes whatever the
// number of scale blocks.
template <typename Tile>
N3_DEVICE void load_codes(char* memory, const Barriers& b, const Problem& p, const int32_t* before, int32_t items,
                          const hopper::TensorMap* up_map, const hopper::TensorMap* down_map) {
  using S = Shared<Tile>;
  Position<S::kStages> at;
  const auto load = [&](const Unit& unit) {
    hopper::wait(b.empty + at.stage, at.parity ^ 1);
    hopper::arrive_expecting(b.landed + at.stage, unit.halves * 2 * S::kBox);
    char* stage = memory + S::stage_at(at.stage);
    const hopper::TensorMap* map = unit.up ? up_map : down_map;
    const int32_t pitch = unit.up ? p.up_pitch : p.down_pitch;
#pragma unroll 1
    for (int half = 0; half < unit.halves; ++half) {
#pragma unroll
      for (int parity = 0; parity < 2; ++parity) {
        hopper::load_tile(stage + S::codes_at(half, parity), map, b.landed + at.stage, parity * pitch + unit.k / 4,
                          unit.row / 2 + 32 * half, unit.expert, 0);
      }
    }
    at.next();
  };
  walk<Tile>(p, before, items, [](const Item&, uint32_t) {}, load);
}

// Bytes kFirst and kFirst + 1, e4m3 scales, halved, times the lower half of `factor`, as bfloat16: exact. Their bits
// are those of a bfloat16 2^120 times as small, subnormals too; but NaN's are those of a number.
template <int kFirst>
N3_DEVICE uint32_t factors_of(uint32_t bytes, uint32_t factor) {
  const uint32_t x = device::spread_bytes<kFirst>(bytes);
  const uint32_t magnitude = x << 4 & 0x07f007f0, nan = (magnitude + 0x00100010) & 0x08000800;
  const uint32_t scale = device::scale_pair<device::BF16, 0>(magnitude | (x << 8 & 0x80008000), 0x7b00);  // by 2^119
  return device::scale_pair<device::BF16, 0>(scale, factor) | ((nan << 4) - (nan >> 5));
}

// The scales of a unit, by one warp: lane q has rows 2 q and 2 q + 1 of each half. A row's 8 bytes begin anywhere; they
// come in whole words, those that have one of them, and all rows' are asked for before the first is used.
template <typename Tile>
N3_DEVICE void load_scales(char* stage, const Scales& s, const Unit& unit, int32_t rows) {
  using S = Shared<Tile>;
  const int lane = threadIdx.x % 32;
  const int32_t first = unit.row + 2 * lane;
  const uint8_t* from = s.data + unit.expert * s.expert_stride + first * s.row_stride + unit.k / kPerScale;
  uint32_t words[4][3];
  int skip[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2 * 64 + i % 2;
    const uint8_t* at = from + row * s.row_stride;
    skip[i] = int(reinterpret_cast<uintptr_t>(at) % 4);
    const int bytes = i / 2 < unit.halves && first + row < rows ? skip[i] + unit.blocks : 0;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      words[i][j] = 4 * j < bytes ? reinterpret_cast<const uint32_t*>(at - skip[i])[j] : 0;
    }
  }
  const uint32_t factor = global_of(s.global[unit.expert]).factor;
  const uint64_t wanted = ~uint64_t(0) >> (64 - 8 * unit.blocks);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t(&w)[3] = words[i];
    const uint32_t low = uint32_t((uint64_t(w[1]) << 32 | w[0]) >> 8 * skip[i]) & uint32_t(wanted);
    const uint32_t high = uint32_t((uint64_t(w[2]) << 32 | w[1]) >> 8 * skip[i]) & uint32_t(wanted >> 32);
    *reinterpret_cast<uint4*>(stage + S::scales_at(i / 2, i % 2, lane)) =
        make_uint4(factors_of<0>(low, factor), factors_of<2>(low, factor), factors_of<0>(high, factor),
                   factors_of<2>(high, factor));
  }
}

// The tokens' rows of x in the order of position_of, for all ranges of an item. By one of kLoaders warps, a row at a
// time: a lane has word j of two of the four threads of a unit.
template <typename Tile>
N3_DEVICE void load_inputs(char* memory, const Barriers& b, const Problem& p, const Item& item, int warp,
                           uint32_t parity) {
  using S = Shared<Tile>;
  const int lane = threadIdx.x % 32;
  const int32_t token = lane < item.count ? p.order[item.first + lane] / p.top_k : 0;
  hopper::wait(b.inputs_empty, parity ^ 1);
  for (int row = warp; row < item.count; row += kLoaders) {
    const device::BF16* from = p.x + int64_t(__shfl_sync(0xffffffffu, token, row)) * p.width;
#pragma unroll 1
    for (int piece = lane; piece < Tile::kWidth / 16; piece += 32) {
      const int thread = piece % 2 * 2, word = piece / 2 % 4, k = piece / 8 * kUnit + 8 * word + 32 * thread;
      uint4 v[2];
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        v[t] = k + 32 * t < p.width ? *reinterpret_cast<const uint4*>(from + k + 32 * t) : make_uint4(0, 0, 0, 0);
      }
      char* block = memory + S::inputs_at(piece / 8 * 2 + word / 2);
      const int at = row * 128 + word % 2 * 64 + 4 * thread;
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // elements 2 i and 2 i + 4 of both; then 2 i + 1 and 2 i + 5
        const uint32_t first[2] = {i ? v[0].y : v[0].x, i ? v[1].y : v[1].x};
        const uint32_t second[2] = {i ? v[0].w : v[0].z, i ? v[1].w : v[1].z};
        *reinterpret_cast<uint2*>(block + swizzled(at + 32 * i)) =
            make_uint2((first[0] & 0xffff) | second[0] << 16, (first[1] & 0xffff) | second[1] << 16);
        *reinterpret_cast<uint2*>(block + swizzled(at + 32 * i + 16)) =
            make_uint2(first[0] >> 16 | (second[0] & 0xffff0000), first[1] >> 16 | (second[1] & 0xffff0000));
      }
    }
  }
  hopper::fence_async();
  __syncwarp();
  if (lane == 0) hopper::arrive(b.inputs_landed);
}

// Inputs and scales; a stage's are always the same warp's.
template <typename Tile>
N3_DEVICE void load_rest(char* memory, const Barriers& b, const Problem& p, const int32_t* before, int32_t items,
                         int warp) {
  using S = Shared<Tile>;
  Position<S::kStages> at;
  const auto load = [&](const Unit& unit) {
    if (at.stage % kLoaders == warp) {
      hopper::wait(b.empty + at.stage, at.parity ^ 1);
      load_scales<Tile>(memory + S::stage_at(at.stage), unit.up ? p.up : p.down, unit, unit.up ? p.inner : p.width);
      __syncwarp();
      if (threadIdx.x % 32 == 0) hopper::arrive(b.landed + at.stage);
    }
    at.next();
  };
  const auto begin = [&](const Item& item, uint32_t index) { load_inputs<Tile>(memory, b, p, item, warp, index % 2); };
  walk<Tile>(p, before, items, begin, load);
}

}  // namespace n3::moe_experts::sm90::nvfp4
