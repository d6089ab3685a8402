// What moe_experts with NVFP4 weights loads on sm_90a: codes by the copy engine, scales and tokens by threads.
#pragma once
#include "experts_frame_sm90.cuh"
#include "experts_nvfp4_plan.h"
#include "nvfp4_codes.cuh"

namespace n3::moe_experts::sm90::nvfp4 {

struct Operands {
  Scales up, down;
  int32_t up_pitch, down_pitch;  // from row to row of codes, in pairs of bytes
};

// The codes of a unit. By one thread. A map's row is two rows of the matrix: so it begins at a multiple of 16 bytes
// whatever the number of scale blocks.
N3_DEVICE void load_codes(char* stage, hopper::Barrier* landed, const hopper::TensorMap* map, const Operands& w,
                          const Unit& unit) {
  const int halves = unit.up ? unit.halves : 2;
  const int32_t pitch = unit.up ? w.up_pitch : w.down_pitch;
  hopper::arrive_expecting(landed, halves * 2 * kBox);
#pragma unroll 1
  for (int half = 0; half < halves; ++half) {
#pragma unroll
    for (int parity = 0; parity < 2; ++parity) {
      hopper::load_tile(stage + codes_at(half, parity), map, landed, parity * pitch + unit.k / 4,
                        unit.row / 2 + 32 * half, unit.expert, 0);
    }
  }
}

// The scales of a unit, by one warp: lane q has rows 2 q and 2 q + 1 of each half. A row's 8 bytes begin anywhere;
// they come in whole words, those that have one of them, and all rows' are asked for before the first is used. What is
// behind the `rows` rows and `depth` k of the matrix, or the next range's, is zero.
N3_DEVICE void load_scales(char* stage, const Scales& s, const Unit& unit, int32_t rows, int32_t depth) {
  const int lane = threadIdx.x % 32;
  const int32_t left = (depth - unit.k) / kPerScale, own = unit.up ? 8 : unit.halves * (kChunk / kPerScale);
  const int32_t first = unit.row + 2 * lane, blocks = left < own ? left : own;
  const uint8_t* from = s.data + unit.expert * s.expert_stride + first * s.row_stride + unit.k / kPerScale;
  uint32_t words[4][3];
  int skip[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = i / 2 * 64 + i % 2;
    const uint8_t* at = from + row * s.row_stride;
    skip[i] = int(reinterpret_cast<uintptr_t>(at) % 4);
    const bool wanted = (i / 2 == 0 || !unit.up || unit.halves == 2) && first + row < rows;
    const int bytes = wanted ? skip[i] + blocks : 0;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
      words[i][j] = 4 * j < bytes ? reinterpret_cast<const uint32_t*>(at - skip[i])[j] : 0;
    }
  }
  const uint32_t factor = global_of(s.global[unit.expert]).factor;
  const uint64_t wanted = ~uint64_t(0) >> (64 - 8 * blocks);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t(&w)[3] = words[i];
    const uint32_t low = uint32_t((uint64_t(w[1]) << 32 | w[0]) >> 8 * skip[i]) & uint32_t(wanted);
    const uint32_t high = uint32_t((uint64_t(w[2]) << 32 | w[1]) >> 8 * skip[i]) & uint32_t(wanted >> 32);
    *reinterpret_cast<uint4*>(stage + scales_at(i / 2, i % 2, lane)) =
        make_uint4(factors_of<0>(low, factor), factors_of<2>(low, factor), factors_of<0>(high, factor),
                   factors_of<2>(high, factor));
  }
}

// A token's row of x in the order of position_of, in blocks of kBlock bytes for 64 k: a lane has word j of two of the
// four threads of a unit.
template <int kWidth, int kBlock>
N3_DEVICE void put_ordered(char* inputs, const device::BF16* from, int32_t width, int row) {
#pragma unroll 1
  for (int piece = threadIdx.x % 32; piece < kWidth / 16; piece += 32) {
    const int thread = piece % 2 * 2, word = piece / 2 % 4, k = piece / 8 * kUnit + 8 * word + 32 * thread;
    uint4 v[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      v[t] = k + 32 * t < width ? *reinterpret_cast<const uint4*>(from + k + 32 * t) : make_uint4(0, 0, 0, 0);
    }
    char* block = inputs + (piece / 8 * 2 + word / 2) * kBlock;
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

}  // namespace n3::moe_experts::sm90::nvfp4
