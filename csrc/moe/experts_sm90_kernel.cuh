// moe_experts on sm_90 for few tokens per expert, when the time is that of reading the weights: up, activation and down
// in one pass, the intermediate in shared memory, the outputs in registers.
//
// Per item, the tokens n of one expert and a range of the inner size, in steps of two chunks of 64 (one per warpgroup):
//   H[128, n] = W_up[chunks, :] X^T                 each warpgroup its 64 rows, float32; of a gate G the same, before
//   A[128, n] = relu(H)^2, or act(G) H              rounded to bfloat16, through shared memory to both warpgroups
//   Y[width, n] += W_down[:, chunks] A              each warpgroup every second 64 rows, in registers, float32
// Weights are operand a and tokens operand b: a tile of tokens has 8 to 32 places instead of 64. Each weight is read
// once. Places without a token hold whatever was there: columns of a product do not mix, and these are not stored.
//
// What a slot is summed from, and in which order, depends on the two sizes alone.
#pragma once
#include "../common/hopper.cuh"
#include "items.cuh"

namespace n3::moe_experts::sm90 {

struct Problem {
  Work work;
  const device::BF16* x;   // [tokens, width], 16-byte aligned
  const int32_t* order;    // slots by expert
  const int32_t* offsets;  // [experts + 1]
  float* rows;             // [slots, rows_per_slot, width]
  int32_t width, inner, top_k;
  bool gelu;               // of the gated activations, not SiLU
};

// Of a stage of weights: that it has landed, and that nobody reads it any more; the same of the inputs.
struct Barriers {
  hopper::Barrier *landed, *empty, *inputs_landed, *inputs_empty;
};

// ---------------------------------------------------------------- the warpgroup that loads

// Weights, in the order in which they are used. By one thread.
template <typename Tile, bool kGated>
N3_DEVICE void load_weights(char* memory, const Barriers& b, const Problem& p, const int32_t* before, int32_t items,
                            const hopper::TensorMap* up_map, const hopper::TensorMap* down_map) {
  using S = Shared<Tile>;
  const int blocks = (p.width + 63) / 64;
  Position<S::kStages> at;
  const auto stage = [&](int bytes) {
    hopper::wait(b.empty + at.stage, at.parity ^ 1);
    hopper::arrive_expecting(b.landed + at.stage, bytes);
    return memory + S::stage_at(at.stage);
  };
  for (int32_t i = blockIdx.x; i < items; i += gridDim.x) {
    const Item item = item_at(p.work, before, p.offsets, i, Tile::kTokens);
    for (int32_t r = item.first_range; r < item.last_range; ++r) {
      const Range range = range_at(p.work.chunks, p.work.ranges, r);
      for (int32_t chunk = range.begin; chunk < range.end; chunk += 2) {
        const int halves = chunk + 1 < range.end ? 2 : 1;
        for (int32_t row = chunk * kChunk; row < (kGated ? 2 : 1) * p.inner; row += p.inner) {
          for (int k = 0; k < blocks; ++k, at.next()) {
            char* to = stage(halves * S::kHalf);
            for (int h = 0; h < halves; ++h) {
              hopper::load_tile(to + h * S::kHalf, up_map, b.landed + at.stage, 64 * k, row + h * kChunk, item.expert,
                                0);
            }
          }
        }
        for (int m = 0; m < Tile::kTiles; ++m) {
          for (int h = 0; h < halves; ++h, at.next()) {  // neighbours in memory one after the other
            char* to = stage(S::kStage);
            for (int w = 0; w < 2; ++w) {
              hopper::load_tile(to + w * S::kHalf, down_map, b.landed + at.stage, (chunk + h) * kChunk,
                                128 * m + 64 * w, item.expert, 0);
            }
          }
        }
      }
    }
  }
}

// The tokens' rows of x, for all ranges of an item. By warps 0 .. 2 of these, a row at a time.
template <typename Tile>
N3_DEVICE void load_inputs(char* memory, const Barriers& b, const Problem& p, const int32_t* before, int32_t items,
                           int warp) {
  using S = Shared<Tile>;
  constexpr int kPieces = Tile::kWidth / 8;  // of 16 bytes
  const int lane = threadIdx.x % 32;
  uint32_t parity = 0;
  for (int32_t i = blockIdx.x; i < items; i += gridDim.x, parity ^= 1) {
    const Item item = item_at(p.work, before, p.offsets, i, Tile::kTokens);
    const int32_t token = lane < item.count ? p.order[item.first + lane] / p.top_k : 0;
    hopper::wait(b.inputs_empty, parity ^ 1);
    for (int row = warp; row < item.count; row += 3) {
      const device::BF16* from = p.x + int64_t(__shfl_sync(0xffffffffu, token, row)) * p.width;
#pragma unroll 4
      for (int piece = lane; piece < kPieces; piece += 32) {
        const bool inside = 8 * piece < p.width;
        const uint4 v = inside ? *reinterpret_cast<const uint4*>(from + 8 * piece) : make_uint4(0, 0, 0, 0);
        const int to = swizzled(piece / 8 * S::kBlock + row * 128 + piece % 8 * 16);
        *reinterpret_cast<uint4*>(memory + S::inputs_at(0) + to) = v;
      }
    }
    hopper::fence_async();
    __syncwarp();
    if (lane == 0) hopper::arrive(b.inputs_landed);
  }
}

// ---------------------------------------------------------------- the warpgroups that compute

// h = 64 rows of W_up times the inputs. A warpgroup that is not to work keeps step.
template <typename Tile>
N3_DEVICE void multiply_up(float (&h)[Tile::kTokens / 2], const char* memory, const Barriers& b,
                           Position<Shared<Tile>::kStages>& at, int blocks, int which, bool works) {
  using S = Shared<Tile>;
  constexpr hopper::Major kK = hopper::Major::kK;
  if (!works) {
    for (int k = 0; k < blocks; ++k, at.next()) {
      hopper::wait(b.landed + at.stage, at.parity);
      release(b.empty + at.stage);
    }
    return;
  }
  int last = 0;
  for (int k = 0; k < blocks; ++k, at.next()) {
    hopper::wait(b.landed + at.stage, at.parity);
    const char* weights = memory + S::stage_at(at.stage) + which * S::kHalf;
    const char* inputs = memory + S::inputs_at(k);
    hopper::fence_products();
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      hopper::Product<device::BF16, Tile::kTokens>::template shared<kK, kK>(h, elements_at(weights, s),
                                                                            elements_at(inputs, s), k + s > 0);
    }
    hopper::commit_products();
    hopper::wait_products<1>();
    if (k) release(b.empty + last);
    last = at.stage;
  }
  hopper::wait_products<0>();
  hopper::pin(h);
  release(b.empty + last);
}

// y += W_down of kHalves chunks times their activations, chunks ascending.
template <typename Tile, int kHalves>
N3_DEVICE void multiply_down(float (&y)[Tile::kTiles][Tile::kTokens / 2], const char* memory, const char* hidden,
                             const Barriers& b, Position<Shared<Tile>::kStages>& at, int which) {
  using S = Shared<Tile>;
  constexpr hopper::Major kK = hopper::Major::kK;
  int last = 0;
#pragma unroll
  for (int m = 0; m < Tile::kTiles; ++m) {
#pragma unroll
    for (int h = 0; h < kHalves; ++h, at.next()) {
      hopper::wait(b.landed + at.stage, at.parity);
      const char* weights = memory + S::stage_at(at.stage) + which * S::kHalf;
      hopper::fence_products();
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        hopper::Product<device::BF16, Tile::kTokens>::template shared<kK, kK>(
            y[m], elements_at(weights, s), elements_at(hidden + h * S::kBlock, s), true);
      }
      hopper::commit_products();
      hopper::wait_products<1>();
      if (m + h) release(b.empty + last);
      last = at.stage;
    }
  }
  hopper::wait_products<0>();
#pragma unroll
  for (int m = 0; m < Tile::kTiles; ++m) hopper::pin(y[m]);
  release(b.empty + last);
}

// The activations of the first `rows` of 64 rows of H, and zeros behind, in rows of tokens: operand b of the second
// product.
template <typename Tile, bool kGated>
N3_DEVICE void publish(const float (&gate)[Tile::kTokens / 2], const float (&h)[Tile::kTokens / 2], char* to, int rows,
                       bool gelu) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4, token = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < Tile::kTokens / 2; i += 2) {
    const bool inside = row + i / 2 % 2 * 8 < rows;
    const auto activated = [&](int e) {
      if constexpr (kGated) return inside ? gated(gate[i + e], h[i + e], gelu) : 0.f;
      return inside ? relu2(h[i + e]) : 0.f;
    };
    const uint32_t pair = device::pack<device::BF16>(activated(0), activated(1));
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int at = swizzled((i / 4 * 8 + token + e) * 128 + (row + i / 2 % 2 * 8) * 2);
      *reinterpret_cast<uint16_t*>(to + at) = uint16_t(pair >> 16 * e);
    }
  }
}

// The outputs of a range to the rows of their slots; or added there to those of the ranges before.
template <typename Tile>
N3_DEVICE void store_outputs(const Problem& p, const float (&y)[Tile::kTiles][Tile::kTokens / 2], const Item& item,
                             int32_t range, int which) {
  const int lane = threadIdx.x % 32, first = 64 * which + threadIdx.x / 32 % 4 * 16 + lane / 4;
  const bool adds = !p.work.split && range > 0;
#pragma unroll
  for (int j = 0; j < Tile::kTokens / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int n = 8 * j + lane % 4 * 2 + e;
      if (n >= item.count) continue;
      const int64_t row = int64_t(p.order[item.first + n]) * rows_per_slot(p.work) + (p.work.split ? range : 0);
      float* to = p.rows + row * p.width;
#pragma unroll
      for (int m = 0; m < Tile::kTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = 128 * m + 8 * half + first;
          if (at >= p.width) continue;
          const float v = y[m][4 * j + 2 * half + e];
          to[at] = adds ? to[at] + v : v;
        }
      }
    }
  }
}

template <typename Tile, bool kGated>
N3_DEVICE void compute(char* memory, const Barriers& b, const Problem& p, const int32_t* before, int32_t items,
                       int which) {
  using S = Shared<Tile>;
  const int blocks = (p.width + 63) / 64;
  Position<S::kStages> at;
  uint32_t parity = 0;
  int slot = 0;
  for (int32_t i = blockIdx.x; i < items; i += gridDim.x, parity ^= 1) {
    const Item item = item_at(p.work, before, p.offsets, i, Tile::kTokens);
    hopper::wait(b.inputs_landed, parity);
    for (int32_t r = item.first_range; r < item.last_range; ++r) {
      const Range range = range_at(p.work.chunks, p.work.ranges, r);
      float y[Tile::kTiles][Tile::kTokens / 2];
#pragma unroll
      for (int m = 0; m < Tile::kTiles; ++m) {
#pragma unroll
        for (int e = 0; e < Tile::kTokens / 2; ++e) y[m][e] = 0.f;
        hopper::pin(y[m]);
      }
      for (int32_t chunk = range.begin; chunk < range.end; chunk += 2, slot ^= 1) {
        const bool both = chunk + 1 < range.end, works = which == 0 || both;
        float gate[Tile::kTokens / 2], h[Tile::kTokens / 2];
        if constexpr (kGated) multiply_up<Tile>(gate, memory, b, at, blocks, which, works);
        multiply_up<Tile>(h, memory, b, at, blocks, which, works);
        if (r + 1 == item.last_range && chunk + 2 >= range.end) release(b.inputs_empty);
        if (works) {
          const int rows = p.inner - (chunk + which) * kChunk;
          publish<Tile, kGated>(gate, h, memory + S::hidden_at(slot, which), rows, p.gelu);
        }
        hopper::fence_async();
        hopper::sync_threads<256>(1);  // and nobody reads the other slot any more
        const char* hidden = memory + S::hidden_at(slot, 0);
        both ? multiply_down<Tile, 2>(y, memory, hidden, b, at, which)
             : multiply_down<Tile, 1>(y, memory, hidden, b, at, which);
      }
      store_outputs<Tile>(p, y, item, r, which);
    }
  }
}

//   grid  plan().blocks, at most one per multiprocessor     block  kThreads: two warpgroups that compute, one whose
//   warp 0 loads weights and whose warps 1 .. 3 load inputs     smem  Shared<Tile>, dynamic
// 232 and 40 registers per thread are 504 for three threads, what 168 at the launch give.
template <typename Tile, bool kGated>
__global__ __launch_bounds__(kThreads, 1) void tensor_experts_kernel_sm90(
    const __grid_constant__ hopper::TensorMap up_map, const __grid_constant__ hopper::TensorMap down_map,
    const __grid_constant__ Problem p) {
  using S = Shared<Tile>;
  char* memory = hopper::shared_memory();
  auto* barriers = reinterpret_cast<hopper::Barrier*>(memory + S::kBarriersAt);
  const Barriers b{barriers, barriers + kMostStages, barriers + 2 * kMostStages, barriers + 2 * kMostStages + 1};
  auto* before = reinterpret_cast<int32_t*>(memory + S::kBeforeAt);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      hopper::init_barrier(b.landed + i, 1);
      hopper::init_barrier(b.empty + i, 8);  // a warp each
    }
    hopper::init_barrier(b.inputs_landed, 3);
    hopper::init_barrier(b.inputs_empty, 8);
    hopper::publish_barriers();
    hopper::prefetch_map(&up_map);
    hopper::prefetch_map(&down_map);
  }
  count_tiles(p.work.experts, before, reinterpret_cast<int32_t*>(memory + S::kTotalsAt),
              [&p](int32_t e) { return tiles_of(p.offsets, e, Tile::kTokens); });
  const int32_t items = items_of(p.work, before);
  // From one lane, that the compiler sees that a warp agrees: descriptors then live in uniform registers.
  const int group = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0), warp = threadIdx.x / 32 % 4;
  if (group == 2) {
    hopper::give_registers<40>();
    if (warp > 0) {
      load_inputs<Tile>(memory, b, p, before, items, warp - 1);
    } else if (threadIdx.x % 32 == 0) {
      load_weights<Tile, kGated>(memory, b, p, before, items, &up_map, &down_map);
    }
  } else {
    hopper::take_registers<232>();
    compute<Tile, kGated>(memory, b, p, before, items, group);
  }
}

}  // namespace n3::moe_experts::sm90
