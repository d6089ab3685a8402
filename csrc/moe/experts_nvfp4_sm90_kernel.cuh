// moe_experts with NVFP4 weights on sm_90a: units of 128 rows by 128 k, decoded in registers, as operand a.
//
// The copy engine brings a unit's codes, as the checkpoint has them; its scales, 8 bytes a row at any address, are
// fetched by threads, who leave them as bfloat16. What lies behind a matrix has scales of zero, never NaN.
#pragma once
#include "experts_nvfp4_sm90_loads.cuh"

namespace n3::moe_experts::sm90::nvfp4 {

template <typename Tile_, bool kGated_>
struct Packed {
  using Tile = Tile_;
  using Ring = PackedRing<Tile>;
  using Operands = nvfp4::Operands;
  static constexpr bool kGated = kGated_, kFits = kHasRoom<Tile, kGated>, kAdjacent = true;
  static constexpr int kDepth = kUnit, kLoaded = 2;  // codes and scales

  N3_DEVICE static float up_rest(const Operands& w, int32_t expert) { return global_of(w.up.global[expert]).rest; }
  N3_DEVICE static float down_rest(const Operands& w, int32_t expert) { return global_of(w.down.global[expert]).rest; }
  N3_DEVICE static float finished(float sum, float rest) { return nvfp4::finished(sum, rest); }
  // Where load_codes put even and odd rows.
  N3_DEVICE static int row_of(int thread, int half) { return thread / 32 % 4 * 16 + thread % 32 / 4 * 2 + half; }
  N3_DEVICE static int place_of(int k) { return position_of(k); }

  N3_DEVICE static void load(char* stage, hopper::Barrier* landed, const hopper::TensorMap* map, const Operands& w,
                             const Unit& unit) {
    load_codes(stage, landed, map, w, unit);
  }
  N3_DEVICE static void load_beside(char* stage, const Problem<Packed>& p, const Unit& unit) {
    const int32_t rows = unit.up ? (kGated ? 2 : 1) * p.inner : p.width;
    load_scales(stage, unit.up ? p.operands.up : p.operands.down, unit, rows, unit.up ? p.width : p.inner);
  }
  N3_DEVICE static void put_row(char* inputs, const device::BF16* from, int32_t width, int row) {
    put_ordered<Tile::kWidth, Ring::kBlock>(inputs, from, width, row);
  }

  struct Products;
};

template <typename Tile, bool kGated>
struct Packed<Tile, kGated>::Products {
  // Registers of outputs and of sums of the first product.
  static constexpr int kSums = (Tile::kTiles + 1 + kGated) * Tile::kTokens / 2;
  // Whether a unit's codes are fetched while those before are decoded: where the sums leave the registers for it.
  static constexpr bool kAhead = kSums - Tile::kTokens / 2 <= 128;
  // Products in a set of operands, as registers allow.
  static constexpr int kGroup = kSums < 140 ? 2 : 1;

  const char* memory;
  const Barriers& b;
  int units, codes, scales;  // the offsets: of this thread in a stage
  Position<Ring::kStages> at;
  // Operand a has two sets of registers: one is decoded while the products of the other run.
  uint32_t a[2][kGroup][4];

  N3_DEVICE Products(const char* memory, const Barriers& b, int32_t width, int which)
      : memory(memory), b(b), units((width + kUnit - 1) / kUnit) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 8 + lane / 4;
    codes = codes_at(which, 0) + swizzled_half(row * 64 + lane % 4 * 16);
    scales = scales_at(which, 0, row) + lane % 4 * 4;
  }

  // h = 64 rows of W_up times the inputs. A warpgroup that is not to work keeps step.
  N3_DEVICE void up(float (&h)[Tile::kTokens / 2], bool works) {
    if (!works) {
      for (int u = 0; u < units; ++u, at.next()) {
        hopper::wait(b.landed + at.stage, at.parity);
        release(b.empty + at.stage);
      }
      return;
    }
    Piece next;
    if (kAhead) next = fetch();
    for (int u = 0; u < units; ++u) {
      const Piece c = kAhead ? next : fetch();
      if (kAhead && u + 1 < units) next = fetch();
      multiply(h, c, memory + Ring::inputs_at(2 * u), u > 0);
    }
    hopper::wait_products<0>();
    hopper::pin(h);
  }

  // y += W_down of two chunks times their activations; the second may be zeros.
  N3_DEVICE void down(float (&y)[Tile::kTiles][Tile::kTokens / 2], const char* hidden, bool) {
    Piece next;
    if (kAhead) next = fetch();
#pragma unroll
    for (int m = 0; m < Tile::kTiles; ++m) {
      const Piece c = kAhead ? next : fetch();
      if (kAhead && m + 1 < Tile::kTiles) next = fetch();
      multiply(y[m], c, hidden, true);
    }
    hopper::wait_products<0>();
#pragma unroll
    for (int m = 0; m < Tile::kTiles; ++m) hopper::pin(y[m]);
  }

  // The next unit, out of its stage.
  N3_DEVICE Piece fetch() {
    hopper::wait(b.landed + at.stage, at.parity);
    const char* stage = memory + Ring::stage_at(at.stage);
    const Piece c{
        {*reinterpret_cast<const uint4*>(stage + codes), *reinterpret_cast<const uint4*>(stage + codes + kBox)},
        {*reinterpret_cast<const uint32_t*>(stage + scales),
         *reinterpret_cast<const uint32_t*>(stage + scales + 32 * 16)}};
    release(b.empty + at.stage);
    at.next();
    return c;
  }

  // d += a unit times operand b, 128 k of it at `tokens`.
  N3_DEVICE void multiply(float (&d)[Tile::kTokens / 2], const Piece& c, const char* tokens, bool adds) {
    step<0>(d, c, tokens, adds);
    step<1>(d, c, tokens, adds);
    step<2>(d, c, tokens, adds);
    step<3>(d, c, tokens, adds);
    step<4>(d, c, tokens, adds);
    step<5>(d, c, tokens, adds);
    step<6>(d, c, tokens, adds);
    step<7>(d, c, tokens, adds);
  }

  // A set of operands is free when the products before the latest have ended.
  template <int kStep>
  N3_DEVICE void step(float (&d)[Tile::kTokens / 2], const Piece& c, const char* tokens, bool adds) {
    constexpr int kAt = kStep % kGroup;
    uint32_t(&operands)[kGroup][4] = a[kStep / kGroup % 2];
    decode<device::BF16, kStep>(c, operands[kAt]);
    if constexpr (kAt + 1 == kGroup) {
      hopper::fence_products();
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        const int which = kStep - kAt + i;
        hopper::Product<device::BF16, Tile::kTokens>::template registers<hopper::Major::kK>(
            d, operands[i], elements_at(tokens + which / 4 * Ring::kBlock, which % 4), adds || which > 0);
      }
      hopper::commit_products();
      hopper::wait_products<1>();
    }
  }
};

}  // namespace n3::moe_experts::sm90::nvfp4
