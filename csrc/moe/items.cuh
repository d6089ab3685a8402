// What the sm_90 kernels of this family share: the work list of a block, its ring of stages, operands of products.
#pragma once
#include "../common/hopper.cuh"
#include "experts_plan.h"

namespace n3::moe_experts::sm90 {

// The stage of the n-th load of a block, and how often it was used before.
template <int kStages>
struct Position {
  int stage = 0;
  uint32_t parity = 0;

  N3_DEVICE void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Fills before[0 .. experts]: the tiles of the experts before, of tiles(e) that each has. By all kThreads threads, with
// a barrier at the end. `totals`: one per warp.
template <typename Tiles>
N3_DEVICE void count_tiles(int32_t experts, int32_t* before, int32_t* totals, Tiles tiles) {
  constexpr int kEach = (kMostExperts + kThreads - 1) / kThreads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = threadIdx.x * kEach;
  int32_t own[kEach], sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    own[i] = first + i < experts ? tiles(first + i) : 0;
    sum += own[i];
  }
  int32_t through = sum;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffffu, through, by);
    if (lane >= by) through += other;
  }
  if (lane == 31) totals[warp] = through;
  __syncthreads();
  int32_t next = through - sum;
  for (int w = 0; w < warp; ++w) next += totals[w];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (first + i <= experts) before[first + i] = next;
    next += own[i];
  }
  __syncthreads();
}

// Descriptor of elements 16 k .. of a tile in rows of 64 elements.
N3_DEVICE uint64_t elements_at(const char* tile, int k) { return hopper::descriptor<128>(tile + 32 * k, 8 * 128, 16); }

// This warp reads the stage no more.
N3_DEVICE void release(hopper::Barrier* empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) hopper::arrive(empty);
}

// Elements at .. at + 3 of a result in float32 or bfloat16, `at` being a multiple of 4.
N3_DEVICE void store_four(void* y, bool in_float, int64_t at, const float4& v) {
  if (in_float) {
    *reinterpret_cast<float4*>(static_cast<float*>(y) + at) = v;
  } else {
    *reinterpret_cast<uint2*>(static_cast<device::BF16*>(y) + at) =
        make_uint2(device::pack<device::BF16>(v.x, v.y), device::pack<device::BF16>(v.z, v.w));
  }
}

// relu(v)^2; NaN stays.
N3_DEVICE float relu2(float v) {
  const float positive = v < 0.f ? 0.f : v;
  return positive * positive;
}

// act(gate) * h with SiLU or the exact GELU; NaN stays.
N3_DEVICE float gated(float gate, float h, bool gelu) {
  const float act = gelu ? 0.5f * gate * (1.f + erff(gate * 0.70710678118654752f)) : gate / (1.f + __expf(-gate));
  return act * h;
}

}  // namespace n3::moe_experts::sm90
