// latent_moe_front and latent_moe_tail on sm_90: products of few tokens with many weights, when the time is that of
// reading the weights.
//
// A block multiplies 64 or 128 rows of the weights, operand a, with a tile of 8 to 128 tokens, operand b, over a part
// of the columns. Both come by the copy engine through a ring of stages. The blocks of a cluster that share the columns
// of a tile read each other's sums from shared memory and add them in the order of the columns, then finish and store.
//
// What an output is summed from, and in which order, depends on the sizes alone. Places without a token are zeros.
#pragma once
#include "../common/hopper.cuh"
#include "items.cuh"
#include "latent_plan.h"

namespace n3::latent_moe::sm90 {

using device::BF16;
using moe_experts::sm90::elements_at;
using moe_experts::sm90::release;
using moe_experts::sm90::swizzled;

// One product: rows of weights and tokens. A step copies 64 units of 16 bits of a row of the weights, and 64 columns of
// the tokens, of which those of float32 weights use the first 32.
struct Term {
  int32_t weights, tokens;  // which of the maps
  int32_t step;             // of this product
  bool wide;                // the weights are float32
};

struct Matrix {  // of weights, for the copy to L2
  const char* data;
  int64_t row_bytes;  // from row to row
  int32_t rows, used;  // and bytes of a row
};

struct Maps {
  hopper::TensorMap weights[3], tokens[2];
};

// The outputs of four neighbouring rows of the weights for a token, `columns` being those of the result.
template <typename T>
N3_DEVICE void put(T* to, int64_t token, int32_t column, int32_t columns, const float (&v)[4]) {
  T* at = to + token * columns + column;
  if (columns % 4 == 0) {
    if constexpr (std::is_same_v<T, float>) {
      *reinterpret_cast<float4*>(at) = make_float4(v[0], v[1], v[2], v[3]);
    } else {
      *reinterpret_cast<uint2*>(at) = make_uint2(device::pack<T>(v[0], v[1]), device::pack<T>(v[2], v[3]));
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i < columns) at[i] = device::narrow<T>(v[i]);
  }
}

// [router | fc1 | shared_up] x.
struct Front {
  Matrix weights[3];
  float* logits;
  BF16 *z, *shared;
  bool wide_router;

  N3_DEVICE bool exact(int section) const { return section == 0; }
  N3_DEVICE Term term(int section, int32_t step) const { return {section, 0, step, section == 0 && wide_router}; }
  N3_DEVICE int32_t columns(int section) const { return weights[section].rows; }
  N3_DEVICE void store(int section, int64_t token, int32_t column, float (&v)[4]) const {
    const int32_t count = columns(section);
    if (section == 0) {
      put(logits, token, column, count, v);
    } else if (section == 1) {
      put(z, token, column, count, v);
    } else {
#pragma unroll
      for (float& value : v) value = moe_experts::sm90::relu2(value);
      put(shared, token, column, count, v);
    }
  }
};

// [fc2 | shared_down] [y, shared], or y + shared_down shared; and a residual.
struct Tail {
  Matrix weights[3];       // fc2, shared_down
  const BF16 *y, *residual;  // [tokens, width] or null; y: without fc2
  BF16* out;
  int32_t latent_steps;

  N3_DEVICE bool exact(int) const { return false; }
  N3_DEVICE Term term(int, int32_t step) const {
    return step < latent_steps ? Term{0, 0, step, false} : Term{1, 1, step - latent_steps, false};
  }
  N3_DEVICE int32_t columns(int) const { return weights[1].rows; }
  N3_DEVICE void store(int, int64_t token, int32_t column, float (&v)[4]) const {
    const int32_t count = columns(0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (column + i >= count) continue;
      const int64_t at = token * count + column + i;
      if (y) v[i] = device::widen(y[at]) + v[i];
      if (residual) v[i] = v[i] + device::widen(residual[at]);
    }
    put(out, token, column, count, v);
  }
};

template <typename Form>
struct Problem {
  Work work;
  int32_t tokens;
  Form form;
};

// Of a stage: that it has landed, and that nobody reads it any more.
struct Barriers {
  hopper::Barrier *landed, *empty;
};

// ---------------------------------------------------------------- the warp that loads

// The beginnings of a tile's rows to L2, before the kernels before this one have ended. By a warp.
template <typename Tile, typename Form>
N3_DEVICE void prefetch(const Form& form, const Maps& maps, const Place& place, const Range& steps) {
  if (steps.begin == steps.end) return;
  const Term term = form.term(place.section, steps.begin);
  if (threadIdx.x % 32 == 0) {
    hopper::prefetch_map(&maps.weights[term.weights]);
    hopper::prefetch_map(&maps.tokens[term.tokens]);
  }
  const Matrix& m = form.weights[term.weights];
  const int32_t at = term.step * kRowBytes, left = m.used - at;
  const int32_t mine = (steps.end - steps.begin) * kRowBytes, ring = Tile::kStages * kRowBytes;
  const int32_t most = mine < ring ? mine : ring, bytes = left < most ? left : most;
  const int32_t first = Tile::kRows * place.tile, behind = first + Tile::kRows;
  for (int32_t row = first + threadIdx.x % 32; row < behind && row < m.rows; row += 32) {
    hopper::prefetch_bytes(m.data + row * m.row_bytes + at, uint32_t(bytes));
  }
}

// By one thread.
template <typename Tile, typename Form>
N3_DEVICE void load(char* memory, const Barriers& b, const Form& form, const Maps& maps, const Place& place,
                    const Range& steps) {
  moe_experts::sm90::Position<Tile::kStages> at;
  for (int32_t step = steps.begin; step < steps.end; ++step, at.next()) {
    const Term term = form.term(place.section, step);
    char* to = memory + at.stage * Tile::kStage;
    hopper::wait(b.empty + at.stage, at.parity ^ 1);
    hopper::arrive_expecting(b.landed + at.stage, Tile::kStage);
    hopper::load_tile(to, &maps.weights[term.weights], b.landed + at.stage, 64 * term.step, Tile::kRows * place.tile, 0,
                      0);
    hopper::load_tile(to + Tile::kWeights, &maps.tokens[term.tokens], b.landed + at.stage,
                      (term.wide ? 32 : 64) * term.step, Tile::kTokens * place.token_tile, 0, 0);
  }
}

// ---------------------------------------------------------------- the warpgroups that multiply: `group` has 64 rows

// sum += the steps' products, in one chain.
template <typename Tile>
N3_DEVICE void multiply(float (&sum)[Tile::kTokens / 2], const char* memory, const Barriers& b, int32_t steps,
                        int group) {
  constexpr hopper::Major kK = hopper::Major::kK;
  moe_experts::sm90::Position<Tile::kStages> at;
  int last = 0;
  for (int32_t step = 0; step < steps; ++step, at.next()) {
    hopper::wait(b.landed + at.stage, at.parity);
    const char *stage = memory + at.stage * Tile::kStage, *tokens = stage + Tile::kWeights;
    const char* weights = stage + group * kRows * kRowBytes;
    hopper::fence_products();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      hopper::Product<BF16, Tile::kTokens>::template shared<kK, kK>(sum, elements_at(weights, k),
                                                                    elements_at(tokens, k), true);
    }
    hopper::commit_products();
    hopper::wait_products<1>();
    if (step) release(b.empty + last);
    last = at.stage;
  }
  hopper::wait_products<0>();
  hopper::pin(sum);
}

// v as the sum of three values of bfloat16: its leading bits, the next, the rest. Exact for all but the smallest;
// of an infinite v the others are 0. Times an infinite token they are NaN where float32 has an infinity, for a term may
// be 0.
N3_DEVICE void split(float v, uint32_t (&terms)[3]) {
  const uint32_t bits = float_bits(v);
  terms[0] = bits & 0xffff0000u;
  float rest = v - bits_float(terms[0]);
  if ((bits & 0x7fffffffu) == 0x7f800000u) rest = 0.f;
  terms[1] = float_bits(rest) & 0xffff0000u;
  terms[2] = float_bits(rest - bits_float(terms[1]));
}

// Operand a of 16 columns of float32, each of its words in three terms.
N3_DEVICE void split_operand(const char* weights, int k, uint32_t (&a)[3][4]) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = (row + i % 2 * 8) * kRowBytes + (16 * k + i / 2 * 8 + lane % 4 * 2) * 4;
    const float2 v = *reinterpret_cast<const float2*>(weights + swizzled(at));
    uint32_t lo[3], hi[3];
    split(v.x, lo);
    split(v.y, hi);
#pragma unroll
    for (int t = 0; t < 3; ++t) a[t][i] = lo[t] >> 16 | (hi[t] & 0xffff0000u);
  }
}

// sum += the steps' products, each step summed by itself: tensor cores do not round to nearest when they add, and what
// that takes from a long sum passes 1e-5. kWide: the weights are float32, multiplied as they are by way of three terms.
template <typename Tile, bool kWide>
N3_DEVICE void multiply_exactly(float (&sum)[Tile::kTokens / 2], const char* memory, const Barriers& b, int32_t steps,
                                int group) {
  using Products = hopper::Product<BF16, Tile::kTokens>;
  constexpr hopper::Major kK = hopper::Major::kK;
  moe_experts::sm90::Position<Tile::kStages> at;
  for (int32_t step = 0; step < steps; ++step, at.next()) {
    hopper::wait(b.landed + at.stage, at.parity);
    const char *stage = memory + at.stage * Tile::kStage, *tokens = stage + Tile::kWeights;
    const char* weights = stage + group * kRows * kRowBytes;
    float part[Tile::kTokens / 2];
    if constexpr (kWide) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        uint32_t a[3][4];
        split_operand(weights, k, a);
#pragma unroll
        for (int t = 0; t < 3; ++t) hopper::pin(a[t]);
        hopper::fence_products();
#pragma unroll
        for (int t = 0; t < 3; ++t) {
          Products::template registers<kK>(part, a[t], elements_at(tokens, k), k + t > 0);
        }
        hopper::commit_products();
        hopper::wait_products<0>();  // other warpgroups of the multiprocessor multiply meanwhile
        hopper::pin(part);
      }
    } else {
      hopper::fence_products();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        Products::template shared<kK, kK>(part, elements_at(weights, k), elements_at(tokens, k), k > 0);
      }
      hopper::commit_products();
      hopper::wait_products<0>();
      hopper::pin(part);
    }
    release(b.empty + at.stage);
#pragma unroll
    for (int i = 0; i < Tile::kTokens / 2; ++i) sum[i] += part[i];
  }
}

// A warpgroup's sums to shared memory, token by token.
template <typename Tile>
N3_DEVICE void deposit(const float (&sum)[Tile::kTokens / 2], float* to) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < Tile::kTokens / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      to[(8 * j + lane % 4 * 2 + e % 2) * Tile::kSumRow + row + e / 2 * 8] = sum[4 * j + e];
    }
  }
}

// Adds the parts of a tile and stores the outputs; the blocks that share a tile also share this.
template <typename Tile, typename Form>
N3_DEVICE void finish(const char* memory, const Problem<Form>& p, const Place& place) {
  constexpr int kQuads = Tile::kRows / 4;
  const int32_t parts = p.work.sections[place.section].parts, token0 = Tile::kTokens * place.token_tile;
  const int32_t rank = int32_t(blockIdx.x) % p.work.cluster, first = rank - place.part;
  const int32_t left = p.tokens - token0, tokens = left < Tile::kTokens ? left : Tile::kTokens;
  const int32_t columns = p.form.columns(place.section);
  for (int32_t i = place.part * Tile::kThreads + threadIdx.x; i < tokens * kQuads; i += parts * Tile::kThreads) {
    const int32_t token = i / kQuads, row = i % kQuads * 4, column = Tile::kRows * place.tile + row;
    if (column >= columns) continue;
    const float* sums = reinterpret_cast<const float*>(memory) + token * Tile::kSumRow + row;
    const auto* own = reinterpret_cast<const float4*>(sums);
    const auto part = [&](int32_t of) { return hopper::read_cluster(own, first + of); };
    const float4 begin = part(0);
    float v[4] = {begin.x, begin.y, begin.z, begin.w};
    for (int32_t of = 1; of < parts; ++of) {
      const float4 next = part(of);
      v[0] += next.x, v[1] += next.y, v[2] += next.z, v[3] += next.w;
    }
    p.form.store(place.section, token0 + token, column, v);
  }
}

//   grid  plan().blocks, in clusters of work.cluster     block  Tile::kThreads: warpgroups that multiply, a warp that
//   loads     smem  Tile::kBytes, dynamic
template <typename Tile, typename Form>
__global__ __launch_bounds__(Tile::kThreads, Tile::kBlocks) void tensor_latent_kernel_sm90(
    const __grid_constant__ Maps maps, const __grid_constant__ Problem<Form> p) {
  constexpr int kLoads = 4 * Tile::kGroups;  // that warp
  char* memory = hopper::shared_memory();
  auto* barriers = reinterpret_cast<hopper::Barrier*>(memory + Tile::kBarriersAt);
  const Barriers b{barriers, barriers + Tile::kStages};
  const Place place = place_of(p.work, blockIdx.x);
  const Section& section = p.work.sections[place.section];
  const bool busy = place.tile < section.tiles;
  const Range all = steps_of(section, place.part), steps = {all.begin, busy ? all.end : all.begin};
  const int warp = __shfl_sync(0xffffffffu, int(threadIdx.x) / 32, 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; ++i) {
      hopper::init_barrier(b.landed + i, 1);
      hopper::init_barrier(b.empty + i, 4 * Tile::kGroups);  // a warp each
    }
    hopper::publish_barriers();
  }
  if (warp == kLoads) prefetch<Tile>(p.form, maps, place, steps);
  __syncthreads();
  hopper::let_next_start();
  hopper::wait_for_previous();
  if (warp == kLoads) {
    if (threadIdx.x % 32 == 0) load<Tile>(memory, b, p.form, maps, place, steps);
  } else {
    float sum[Tile::kTokens / 2];
#pragma unroll
    for (float& v : sum) v = 0.f;
    hopper::pin(sum);
    const int32_t count = steps.end - steps.begin, group = warp / 4;
    if (!p.form.exact(place.section)) {
      multiply<Tile>(sum, memory, b, count, group);
    } else if (p.form.term(place.section, 0).wide) {
      multiply_exactly<Tile, true>(sum, memory, b, count, group);
    } else {
      multiply_exactly<Tile, false>(sum, memory, b, count, group);
    }
    hopper::sync_threads<128 * Tile::kGroups>(1);  // nobody reads the stages any more
    deposit<Tile>(sum, reinterpret_cast<float*>(memory));
  }
  hopper::sync_cluster();
  if (busy) finish<Tile>(memory, p, place);
  hopper::sync_cluster();  // a block's shared memory is there until all have read it
}

}  // namespace n3::latent_moe::sm90
