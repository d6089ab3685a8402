// moe_experts with dense weights on sm_90a: units of 128 rows by 64 k, as they lie in memory, and their products from
// shared memory.
#pragma once
#include "experts_frame_sm90.cuh"

namespace n3::moe_experts::sm90 {

struct DenseOperands {};  // the maps say all

template <typename Tile_, bool kGated_>
struct Dense {
  using Tile = Tile_;
  using Ring = DenseRing<Tile>;
  static constexpr bool kGated = kGated_, kFits = true, kAdjacent = false;
  static constexpr int kDepth = 64, kLoaded = 1;
  using Operands = DenseOperands;

  N3_DEVICE static float up_rest(const Operands&, int32_t) { return 1.f; }
  N3_DEVICE static float down_rest(const Operands&, int32_t) { return 1.f; }
  N3_DEVICE static float finished(float sum, float) { return sum; }
  N3_DEVICE static int row_of(int thread, int half) { return thread / 32 % 4 * 16 + thread % 32 / 4 + 8 * half; }
  N3_DEVICE static int place_of(int k) { return k; }

  N3_DEVICE static void load(char* stage, hopper::Barrier* landed, const hopper::TensorMap* map, const Operands&,
                             const Unit& unit) {
    const int halves = unit.up ? unit.halves : 2;
    hopper::arrive_expecting(landed, uint32_t(halves * kHalf));
    for (int h = 0; h < halves; ++h) {
      hopper::load_tile(stage + h * kHalf, map, landed, unit.k, unit.row + 64 * h, unit.expert, 0);
    }
  }

  N3_DEVICE static void put_row(char* inputs, const device::BF16* from, int32_t width, int row) {
#pragma unroll 4
    for (int piece = threadIdx.x % 32; piece < Tile::kWidth / 8; piece += 32) {  // of 16 bytes
      const bool inside = 8 * piece < width;
      const uint4 v = inside ? *reinterpret_cast<const uint4*>(from + 8 * piece) : make_uint4(0, 0, 0, 0);
      const int to = swizzled(piece / 8 * Ring::kBlock + row * 128 + piece % 8 * 16);
      *reinterpret_cast<uint4*>(inputs + to) = v;
    }
  }

  struct Products;
};

template <typename Tile, bool kGated>
struct Dense<Tile, kGated>::Products {
  const char* memory;
  const Barriers& b;
  int blocks, which;
  Position<Ring::kStages> at;

  N3_DEVICE Products(const char* memory, const Barriers& b, int32_t width, int which)
      : memory(memory), b(b), blocks((width + 63) / 64), which(which) {}

  // h = 64 rows of W_up times the inputs. A warpgroup that is not to work keeps step.
  N3_DEVICE void up(float (&h)[Tile::kTokens / 2], bool works) {
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
      multiply(h, memory + Ring::inputs_at(k), k > 0);
      if (k) release(b.empty + last);
      last = at.stage;
    }
    hopper::wait_products<0>();
    hopper::pin(h);
    release(b.empty + last);
  }

  // y += W_down of one or two chunks times their activations, chunks ascending.
  N3_DEVICE void down(float (&y)[Tile::kTiles][Tile::kTokens / 2], const char* hidden, bool both) {
    both ? down<2>(y, hidden) : down<1>(y, hidden);
  }

  template <int kHalves>
  N3_DEVICE void down(float (&y)[Tile::kTiles][Tile::kTokens / 2], const char* hidden) {
    int last = 0;
#pragma unroll
    for (int m = 0; m < Tile::kTiles; ++m) {
#pragma unroll
      for (int h = 0; h < kHalves; ++h, at.next()) {
        hopper::wait(b.landed + at.stage, at.parity);
        multiply(y[m], hidden + h * Ring::kBlock, true);
        if (m + h) release(b.empty + last);
        last = at.stage;
      }
    }
    hopper::wait_products<0>();
#pragma unroll
    for (int m = 0; m < Tile::kTiles; ++m) hopper::pin(y[m]);
    release(b.empty + last);
  }

  // A group of products of this warpgroup's rows of the stage; those before have ended.
  N3_DEVICE void multiply(float (&d)[Tile::kTokens / 2], const char* tokens, bool adds) {
    constexpr hopper::Major kK = hopper::Major::kK;
    const char* weights = memory + Ring::stage_at(at.stage) + which * kHalf;
    hopper::fence_products();
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      hopper::Product<device::BF16, Tile::kTokens>::template shared<kK, kK>(d, elements_at(weights, s),
                                                                            elements_at(tokens, s), adds || s > 0);
    }
    hopper::commit_products();
    hopper::wait_products<1>();
  }
};

}  // namespace n3::moe_experts::sm90
