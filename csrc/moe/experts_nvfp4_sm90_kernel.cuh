// moe_experts with NVFP4 weights on sm_90a for few tokens per expert: the steps of experts_sm90_kernel.cuh with weights
// that are decoded in registers, as operand a.
//
// Per step of two chunks of 64 of the inner size:
//   H[128, n] = W_up[chunks, :] X^T                 each warpgroup the 64 rows of one chunk, float32
//   A[128, n] = relu(H g_up)^2                      rounded to bfloat16, through shared memory to both warpgroups
//   Y[width, n] += W_down[:, chunks] A              each warpgroup every second 64 rows, in registers, float32
// A unit of 128 rows by 128 k is one stage. The copy engine brings its codes, as the checkpoint has them; its scales, 8
// bytes a row at any address, are fetched by threads, who leave them as bfloat16. What lies behind a matrix has scales
// of zero, never NaN.
#pragma once
#include "experts_nvfp4_sm90_loads.cuh"

namespace n3::moe_experts::sm90::nvfp4 {

// What a thread has of a unit: 32 neighbouring k of two neighbouring rows, and the factors of their two blocks.
struct Codes {
  uint4 even, odd;
  uint32_t even_factors, odd_factors;
};

// Whether a unit's codes are fetched while those before are decoded: where the outputs leave the registers for it.
template <typename Tile>
constexpr bool kAhead = Tile::kTiles * Tile::kTokens / 2 <= 128;

// Products in a set of operands, as registers allow beside the sums of both products.
template <typename Tile>
constexpr int kGroup = (Tile::kTiles + 1) * Tile::kTokens / 2 < 140 ? 2 : 1;

// This thread's offsets in a stage.
struct Place {
  int codes, scales;

  template <typename Tile>
  N3_DEVICE static Place of(int which) {
    using S = Shared<Tile>;
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 8 + lane / 4;
    return {S::codes_at(which, 0) + swizzled_half(row * 64 + lane % 4 * 16),
            S::scales_at(which, 0, row) + lane % 4 * 4};
  }
};

// The next unit, out of its stage.
template <typename Tile>
N3_DEVICE Codes fetch(const char* memory, const Barriers& b, const Place& place,
                      Position<Shared<Tile>::kStages>& at) {
  using S = Shared<Tile>;
  hopper::wait(b.landed + at.stage, at.parity);
  const char* stage = memory + S::stage_at(at.stage);
  const Codes c{*reinterpret_cast<const uint4*>(stage + place.codes),
                *reinterpret_cast<const uint4*>(stage + place.codes + S::kBox),
                *reinterpret_cast<const uint32_t*>(stage + place.scales),
                *reinterpret_cast<const uint32_t*>(stage + place.scales + 32 * 16)};
  release(b.empty + at.stage);
  at.next();
  return c;
}

// Operand a of the product kStep, 0 .. 7, of a unit.
template <int kStep>
N3_DEVICE void decode(const Codes& c, uint32_t (&a)[4]) {
  constexpr int kWord = kStep / 2, kCode = kStep % 2 * 2;
  const auto word = [](const uint4& v) { return kWord == 0 ? v.x : kWord == 1 ? v.y : kWord == 2 ? v.z : v.w; };
  const uint32_t even = word(c.even), odd = word(c.odd);
  a[0] = device::scale_pair<device::BF16, kWord / 2>(codes_bf16<kCode>(even), c.even_factors);
  a[1] = device::scale_pair<device::BF16, kWord / 2>(codes_bf16<kCode>(odd), c.odd_factors);
  a[2] = device::scale_pair<device::BF16, kWord / 2>(codes_bf16<kCode + 1>(even), c.even_factors);
  a[3] = device::scale_pair<device::BF16, kWord / 2>(codes_bf16<kCode + 1>(odd), c.odd_factors);
  hopper::pin(a);
}

// d += a unit times operand b, 128 k of it at `tokens`. Operand a has two sets of registers: one is decoded while the
// products of the other run, which only those before that must have left.
template <typename Tile>
N3_DEVICE void multiply(float (&d)[Tile::kTokens / 2], uint32_t (&a)[2][kGroup<Tile>][4], const Codes& c,
                        const char* tokens, bool adds) {
  using S = Shared<Tile>;
  const auto step = [&](auto constant) {
    constexpr int kStep = decltype(constant)::value, kAt = kStep % kGroup<Tile>;
    uint32_t(&operands)[kGroup<Tile>][4] = a[kStep / kGroup<Tile> % 2];
    decode<kStep>(c, operands[kAt]);
    if constexpr (kAt + 1 == kGroup<Tile>) {
      hopper::fence_products();
#pragma unroll
      for (int i = 0; i < kGroup<Tile>; ++i) {
        const int at = kStep - kAt + i;
        hopper::Product<device::BF16, Tile::kTokens>::template registers<hopper::Major::kK>(
            d, operands[i], elements_at(tokens + at / 4 * S::kBlock, at % 4), adds || at > 0);
      }
      hopper::commit_products();
      hopper::wait_products<1>();
    }
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

// h = 64 rows of W_up times the inputs. A warpgroup that is not to work keeps step.
template <typename Tile>
N3_DEVICE void multiply_up(float (&h)[Tile::kTokens / 2], uint32_t (&a)[2][kGroup<Tile>][4], const char* memory,
                           const Barriers& b, const Place& place, Position<Shared<Tile>::kStages>& at, int units,
                           bool works) {
  using S = Shared<Tile>;
  if (!works) {
    for (int u = 0; u < units; ++u, at.next()) {
      hopper::wait(b.landed + at.stage, at.parity);
      release(b.empty + at.stage);
    }
    return;
  }
  Codes next;
  if (kAhead<Tile>) next = fetch<Tile>(memory, b, place, at);
  for (int u = 0; u < units; ++u) {
    const Codes c = kAhead<Tile> ? next : fetch<Tile>(memory, b, place, at);
    if (kAhead<Tile> && u + 1 < units) next = fetch<Tile>(memory, b, place, at);
    multiply<Tile>(h, a, c, memory + S::inputs_at(2 * u), u > 0);
  }
  hopper::wait_products<0>();
  hopper::pin(h);
}

// y += W_down of two chunks times their activations.
template <typename Tile>
N3_DEVICE void multiply_down(float (&y)[Tile::kTiles][Tile::kTokens / 2], uint32_t (&a)[2][kGroup<Tile>][4],
                             const char* memory, const char* hidden, const Barriers& b, const Place& place,
                             Position<Shared<Tile>::kStages>& at) {
  Codes next;
  if (kAhead<Tile>) next = fetch<Tile>(memory, b, place, at);
#pragma unroll
  for (int m = 0; m < Tile::kTiles; ++m) {
    const Codes c = kAhead<Tile> ? next : fetch<Tile>(memory, b, place, at);
    if (kAhead<Tile> && m + 1 < Tile::kTiles) next = fetch<Tile>(memory, b, place, at);
    multiply<Tile>(y[m], a, c, hidden, true);
  }
  hopper::wait_products<0>();
#pragma unroll
  for (int m = 0; m < Tile::kTiles; ++m) hopper::pin(y[m]);
}

// Row of 64 that element `half` of a thread's pairs of results is of: where load_codes put even and odd rows.
N3_DEVICE int row_of(int half) { return threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4 * 2 + half; }

// The activations of the first `rows` of a chunk's 64 rows of H, and zeros behind: operand b of the second product.
template <typename Tile>
N3_DEVICE void publish(const float (&h)[Tile::kTokens / 2], char* hidden, int which, int rows, float rest) {
  const int token = threadIdx.x % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row_of(half), k = position_of(kChunk * which + row);
    const bool inside = row < rows;
#pragma unroll
    for (int j = 0; j < Tile::kTokens / 8; ++j) {
      const auto activated = [&](int e) {
        return inside ? relu2(finished(h[4 * j + 2 * half + e], rest)) : 0.f;
      };
      const uint32_t pair = device::pack<device::BF16>(activated(0), activated(1));
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = k / 64 * Shared<Tile>::kBlock + swizzled((8 * j + token + e) * 128 + k % 64 * 2);
        *reinterpret_cast<uint16_t*>(hidden + at) = uint16_t(pair >> 16 * e);
      }
    }
  }
}

// The outputs of a range to the rows of their slots; or added there to those of the ranges before.
template <typename Tile>
N3_DEVICE void store_outputs(const Problem& p, const float (&y)[Tile::kTiles][Tile::kTokens / 2], const Item& item,
                             int32_t range, int which, float rest) {
  const int first = 64 * which + row_of(0), token = threadIdx.x % 4 * 2;
  const bool adds = !p.work.split && range > 0;
#pragma unroll
  for (int j = 0; j < Tile::kTokens / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int n = 8 * j + token + e;
      if (n >= item.count) continue;
      const int64_t row = int64_t(p.order[item.first + n]) * rows_per_slot(p.work) + (p.work.split ? range : 0);
      float* to = p.rows + row * p.width;
#pragma unroll
      for (int m = 0; m < Tile::kTiles; ++m) {
        const int at = kUnit * m + first;
        if (at >= p.width) continue;
        float2 v{finished(y[m][4 * j + e], rest), finished(y[m][4 * j + 2 + e], rest)};
        auto* place = reinterpret_cast<float2*>(to + at);
        if (adds) {
          const float2 sum = *place;
          v.x = sum.x + v.x, v.y = sum.y + v.y;
        }
        *place = v;
      }
    }
  }
}

template <typename Tile>
N3_DEVICE void compute(char* memory, const Barriers& b, const Problem& p, const int32_t* before, int32_t items,
                       int which) {
  using S = Shared<Tile>;
  const int units = (p.width + kUnit - 1) / kUnit;
  const Place place = Place::of<Tile>(which);
  Position<S::kStages> at;
  uint32_t parity = 0, a[2][kGroup<Tile>][4];
  int slot = 0;
  for (int32_t i = blockIdx.x; i < items; i += gridDim.x, parity ^= 1) {
    const Item item = item_at(p.work, before, p.offsets, i, Tile::kTokens);
    const float up_rest = global_of(p.up.global[item.expert]).rest;
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
        const bool works = chunk + which < range.end;
        float h[Tile::kTokens / 2];
        multiply_up<Tile>(h, a, memory, b, place, at, units, works);
        if (r + 1 == item.last_range && chunk + 2 >= range.end) release(b.inputs_empty);
        const int rows = works ? p.inner - (chunk + which) * kChunk : 0;
        publish<Tile>(h, memory + S::hidden_at(slot, 0), which, rows, up_rest);
        hopper::fence_async();
        hopper::sync_threads<256>(1);  // and nobody reads the other slot any more
        multiply_down<Tile>(y, a, memory, memory + S::hidden_at(slot, 0), b, place, at);
      }
      store_outputs<Tile>(p, y, item, r, which, global_of(p.down.global[item.expert]).rest);
    }
  }
}

//   grid  plan().blocks, at most one per multiprocessor     block  kThreads: two warpgroups that compute, one whose
//   warp 0 loads codes and whose warps 1 .. 3 load scales and inputs     smem  Shared<Tile>, dynamic
// 224 and 56 registers per thread are 504 for three threads, what 168 at the launch give.
template <typename Tile>
__global__ __launch_bounds__(kThreads, 1) void tensor_experts_nvfp4_kernel_sm90(
    const __grid_constant__ hopper::TensorMap up_map, const __grid_constant__ hopper::TensorMap down_map,
    const __grid_constant__ Problem p) {
  using S = Shared<Tile>;
  char* memory = hopper::shared_memory();
  auto* barriers = reinterpret_cast<hopper::Barrier*>(memory + S::kBarriersAt);
  const Barriers b{barriers, barriers + S::kMostStages, barriers + 2 * S::kMostStages,
                   barriers + 2 * S::kMostStages + 1};
  auto* before = reinterpret_cast<int32_t*>(memory + S::kBeforeAt);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      hopper::init_barrier(b.landed + i, 2);  // codes and scales
      hopper::init_barrier(b.empty + i, 8);   // a warp each
    }
    hopper::init_barrier(b.inputs_landed, kLoaders);
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
    hopper::give_registers<56>();
    if (warp > 0) {
      load_rest<Tile>(memory, b, p, before, items, warp - 1);
    } else if (threadIdx.x % 32 == 0) {
      load_codes<Tile>(memory, b, p, before, items, &up_map, &down_map);
    }
  } else {
    hopper::take_registers<224>();
    compute<Tile>(memory, b, p, before, items, group);
  }
}

}  // namespace n3::moe_experts::sm90::nvfp4
