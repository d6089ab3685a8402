// The frame of moe_experts on sm_90a for few tokens per expert, when the time is that of reading the weights: one
// launch that finds each expert's slots, multiplies up, activates, multiplies down and adds up a token's slots.
//
// Per item, the tokens n of one expert and a range of the inner size, in steps of two chunks of 64 (one per warpgroup):
//   H[128, n] = W_up[chunks, :] X^T                 each warpgroup its 64 rows, float32; of a gate G the same, before
//   A[128, n] = relu(H)^2, or act(G) H              rounded to bfloat16, through shared memory to both warpgroups
//   Y[width, n] += W_down[:, chunks] A              each warpgroup every second 64 rows, in registers, float32
// Weights are operand a and tokens operand b: a tile of tokens has 8 to 32 places instead of 64. Each weight is read
// once. Places without a token hold whatever was there: columns of a product do not mix, and these are not stored.
//
// What a slot is summed from, and in which order, depends on the two sizes alone.
//
// A Format says how weights lie in memory, come to shared memory and are multiplied:
//   Tile, kGated; Ring: its shared memory; kDepth: k of a unit of weights, which has 128 rows; kAdjacent: the two rows
//   that a thread has of 16 are neighbours; kLoaded: arrivals that say that a stage is there; Operands
//   load(), load_beside(): a unit, by the copy engine and by the other warps that load; put_row(): a token's inputs
//   Products: up(), down(); row_of(), place_of(): where results and activations belong
//   finished(): a sum, scaled by what up_rest() and down_rest() say of an expert
#pragma once
#include "experts_sum_sm90.cuh"

namespace n3::moe_experts::sm90 {

template <typename Format>
struct Problem : Call {
  typename Format::Operands operands;
};

// Of a stage of weights: that it has landed, and that nobody reads it any more; the same of the inputs.
struct Barriers {
  hopper::Barrier *landed, *empty, *inputs_landed, *inputs_empty;
};

// Of the item that range r is of.
N3_DEVICE bool is_last_range(const Work& w, int32_t r) { return w.split || r + 1 == w.ranges; }

// ---------------------------------------------------------------- the warpgroup that loads

// The index of this block's n-th item, and whether there is one.
N3_DEVICE int32_t item_of(int32_t n) { return int32_t(blockIdx.x) + n * int32_t(gridDim.x); }
N3_DEVICE bool has_item(const Call& p, const Tiles& tiles, int32_t n) {
  return item_of(n) < items_of(p.work, tiles.before);
}

struct Unit {
  bool up;
  int32_t expert, row, k;
  int halves;  // chunks of the step: 1 or 2. Of W_up, as many times 64 rows; of W_down, columns
};

// Unit u of the step that begins at `chunk`: those of W_up, of the gate first; then those of W_down, its columns being
// neighbours in memory.
template <typename Format>
N3_DEVICE Unit unit_at(const Problem<Format>& p, int32_t expert, int32_t chunk, int halves, int32_t u) {
  constexpr int kDepth = Format::kDepth;
  const int32_t deep = (p.width + kDepth - 1) / kDepth, ups = Format::kGated ? 2 * deep : deep;
  if (u < ups) {
    const int32_t half = Format::kGated && u >= deep;
    return {true, expert, chunk * kChunk + half * p.inner, (u - half * deep) * kDepth, halves};
  }
  const int32_t wide = kDepth == kChunk ? halves : 1;
  return {false, expert, (u - ups) / wide * 128, chunk * kChunk + (u - ups) % wide * kDepth, halves};
}

template <typename Format>
N3_DEVICE int32_t units_of(const Problem<Format>& p, int halves) {
  constexpr int kDepth = Format::kDepth;
  return (p.width + kDepth - 1) / kDepth * (Format::kGated ? 2 : 1) +
         Format::Tile::kTiles * (kDepth == kChunk ? halves : 1);
}

// Calls visit(unit) for all units of this block, in the order in which they are used, and begin(place, n) before the
// first of the block's n-th item.
template <typename Format, typename Begin, typename Visit>
N3_DEVICE void walk(const Problem<Format>& p, const Tiles& tiles, Begin begin, Visit visit) {
  for (int32_t n = 0; has_item(p, tiles, n); ++n) {
    const Place place = place_at(p.work, tiles.before, item_of(n));
    begin(place, n);
    for (int32_t r = place.first_range;; ++r) {
      const auto end = [&] { return range_at(p.work.chunks, p.work.ranges, hopper::forgotten(r)).end; };
      for (int32_t chunk = range_at(p.work.chunks, p.work.ranges, r).begin; chunk < end(); chunk += 2) {
        const int halves = chunk + 1 < end() ? 2 : 1;
#pragma unroll 1
        for (int32_t u = 0; u < units_of(p, halves); ++u) visit(unit_at(p, place.expert, chunk, halves, u));
      }
      if (is_last_range(p.work, r)) break;
    }
  }
}

// Weights. By one thread.
template <typename Format>
N3_DEVICE void load_weights(char* memory, const Barriers& b, const Problem<Format>& p, const Tiles& tiles,
                            const hopper::TensorMap* up_map, const hopper::TensorMap* down_map) {
  using S = typename Format::Ring;
  Position<S::kStages> at;
  walk(p, tiles, [](const Place&, int32_t) {}, [&](const Unit& unit) {
    hopper::wait(b.empty + at.stage, at.parity ^ 1);
    Format::load(memory + S::stage_at(at.stage), b.landed + at.stage, unit.up ? up_map : down_map, p.operands, unit);
    at.next();
  });
}

// The tokens' rows of x, for all ranges of the block's n-th item. By kLoaders warps, a row at a time.
template <typename Format>
N3_DEVICE void load_inputs(char* memory, const Barriers& b, const Problem<Format>& p, const Tiles& tiles,
                           const Place& place, int32_t n, int warp) {
  using S = typename Format::Ring;
  constexpr int kTokens = Format::Tile::kTokens;
  auto& list = *reinterpret_cast<List<kTokens>*>(memory + S::list_at(n % S::kLists));
  if (warp == 0) {
    list_slots(p, tiles.slots, place.expert, place.tile * kTokens, list);
    list.tile = tiles.before[place.expert] + place.tile, list.first_range = place.first_range;
    list.up_rest = Format::up_rest(p.operands, place.expert);
    list.down_rest = Format::down_rest(p.operands, place.expert);
  }
  hopper::sync_threads<32 * kLoaders>(2);
  hopper::wait(b.inputs_empty, uint32_t(n + 1) % 2);
  for (int row = warp; row < list.count; row += kLoaders) {
    const int64_t token = list.slot(row) / p.top_k;
    Format::put_row(memory + S::inputs_at(0), p.x + token * p.width, p.width, row);
  }
  hopper::fence_async();
  __syncwarp();
  if (threadIdx.x % 32 == 0) hopper::arrive(b.inputs_landed);
}

// Inputs, and what the copy engine leaves: of a stage always the same warp's.
template <typename Format>
N3_DEVICE void load_rest(char* memory, const Barriers& b, const Problem<Format>& p, const Tiles& tiles, int warp) {
  using S = typename Format::Ring;
  const auto begin = [&](const Place& place, int32_t n) {
    load_inputs(memory, b, p, tiles, place, n, warp);
  };
  if constexpr (Format::kLoaded == 1) {
    for (int32_t n = 0; has_item(p, tiles, n); ++n) begin(place_at(p.work, tiles.before, item_of(n)), n);
  } else {
    Position<S::kStages> at;
    walk(p, tiles, begin, [&](const Unit& unit) {
      if (at.stage % kLoaders == warp) {
        hopper::wait(b.empty + at.stage, at.parity ^ 1);
        Format::load_beside(memory + S::stage_at(at.stage), p, unit);
        __syncwarp();
        if (threadIdx.x % 32 == 0) hopper::arrive(b.landed + at.stage);
      }
      at.next();
    });
  }
}

// ---------------------------------------------------------------- the warpgroups that compute

// The activations of the first `rows` of a chunk's 64 rows of H, and zeros behind: operand b of the second product.
template <typename Format>
N3_DEVICE void publish(const float (&gate)[Format::Tile::kTokens / 2], const float (&h)[Format::Tile::kTokens / 2],
                       char* hidden, int which, int rows, float rest, bool gelu) {
  using S = typename Format::Ring;
  const int thread = hopper::forgotten(int(threadIdx.x)), token = thread % 4 * 2;  // addresses are not to be kept
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = Format::row_of(thread, half), k = Format::place_of(kChunk * which + row);
    const bool inside = row < rows;
#pragma unroll
    for (int j = 0; j < Format::Tile::kTokens / 8; ++j) {
      const auto activated = [&](int e) {
        const float v = Format::finished(h[4 * j + 2 * half + e], rest);
        if constexpr (Format::kGated) {
          return inside ? gated(Format::finished(gate[4 * j + 2 * half + e], rest), v, gelu) : 0.f;
        }
        return inside ? relu2(v) : 0.f;
      };
      const uint32_t pair = device::pack<device::BF16>(activated(0), activated(1));
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = k / 64 * S::kBlock + swizzled((8 * j + token + e) * 128 + k % 64 * 2);
        *reinterpret_cast<uint16_t*>(hidden + at) = uint16_t(pair >> 16 * e);
      }
    }
  }
}

// The outputs of a range to the rows of their slots; or added there to those of the ranges before.
template <typename Format>
N3_DEVICE void store_outputs(const Call& p, const float (&y)[Format::Tile::kTiles][Format::Tile::kTokens / 2],
                             const List<Format::Tile::kTokens>& list, int32_t range, int which, float rest) {
  constexpr int kTokens = Format::Tile::kTokens;
  const int thread = hopper::forgotten(int(threadIdx.x));
  const int first = 64 * which + Format::row_of(thread, 0), token = thread % 4 * 2;
  const bool adds = !p.work.split && range > 0;
#pragma unroll
  for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int n = hopper::forgotten(8 * j + token + e);  // there is room for one row's address at a time
      if (n >= list.count) continue;
      const int64_t row = int64_t(list.slot(n)) * rows_per_slot(p.work) + (p.work.split ? range : 0);
      float* to = p.rows + row * p.width;
#pragma unroll
      for (int m = 0; m < Format::Tile::kTiles; ++m) {
        float2 v{Format::finished(y[m][4 * j + e], rest), Format::finished(y[m][4 * j + 2 + e], rest)};
        const int at = 128 * m + first;
        if constexpr (Format::kAdjacent) {
          if (at >= p.width) continue;
          auto* place = reinterpret_cast<float2*>(to + at);
          if (adds) {
            const float2 sum = *place;
            v.x = sum.x + v.x, v.y = sum.y + v.y;
          }
          *place = v;
        } else {
          if (at < p.width) to[at] = adds ? to[at] + v.x : v.x;
          if (at + 8 < p.width) to[at + 8] = adds ? to[at + 8] + v.y : v.y;
        }
      }
    }
  }
}

template <typename Format>
N3_DEVICE void compute(char* memory, const Barriers& b, const Problem<Format>& p, const Tiles& tiles, int which) {
  using Tile = typename Format::Tile;
  using S = typename Format::Ring;
  typename Format::Products products(memory, b, p.width, which);
  int slot = 0;
  for (int32_t n = 0; has_item(p, tiles, n); ++n) {
    const auto& list = *reinterpret_cast<const List<Tile::kTokens>*>(memory + S::list_at(n % S::kLists));
    hopper::wait(b.inputs_landed, n % 2);
    for (int32_t r = list.first_range;; ++r) {
      const auto end = [&] { return range_at(p.work.chunks, p.work.ranges, hopper::forgotten(r)).end; };
      float y[Tile::kTiles][Tile::kTokens / 2];
#pragma unroll
      for (int m = 0; m < Tile::kTiles; ++m) {
#pragma unroll
        for (int e = 0; e < Tile::kTokens / 2; ++e) y[m][e] = 0.f;
        hopper::pin(y[m]);
      }
      for (int32_t chunk = range_at(p.work.chunks, p.work.ranges, r).begin; chunk < end(); chunk += 2, slot ^= 1) {
        const bool works = chunk + which < end();
        float gate[Tile::kTokens / 2], h[Tile::kTokens / 2];
        if constexpr (Format::kGated) products.up(gate, works);
        products.up(h, works);
        if (is_last_range(p.work, r) && chunk + 2 >= end()) release(b.inputs_empty);
        char* hidden = memory + S::hidden_at(slot, 0);
        publish<Format>(gate, h, hidden, which, works ? p.inner - (chunk + which) * kChunk : 0, list.up_rest, p.gelu);
        hopper::fence_async();
        hopper::sync_threads<kComputing>(1);  // and nobody reads the other slot any more
        products.down(y, hidden, chunk + 1 < end());
      }
      store_outputs<Format>(p, y, list, r, which, list.down_rest);
      if (is_last_range(p.work, r)) break;
    }
    add_up(p, list, *reinterpret_cast<Meeting*>(memory + S::kMeetingAt));
  }
}

//   grid  plan().blocks, at most one per multiprocessor     block  kThreads: two warpgroups that compute, one whose
//   warp 0 loads weights and whose warps 1 .. 3 load the rest     smem  Format::Ring, dynamic
// 224 and 56 registers per thread are 504 for three threads, what 168 at the launch give.
template <typename Format>
__global__ __launch_bounds__(kThreads, 1) void tensor_experts_kernel_sm90(
    const __grid_constant__ hopper::TensorMap up_map, const __grid_constant__ hopper::TensorMap down_map,
    const __grid_constant__ Problem<Format> p) {
  using S = typename Format::Ring;
  char* memory = hopper::shared_memory();
  auto* barriers = reinterpret_cast<hopper::Barrier*>(memory + S::kBarriersAt);
  const Barriers b{barriers, barriers + S::kMostStages, barriers + 2 * S::kMostStages,
                   barriers + 2 * S::kMostStages + 1};
  auto& tiles = *reinterpret_cast<Tiles*>(memory + S::kBeforeAt);
  for (int32_t e = threadIdx.x; e < p.work.experts; e += kThreads) tiles.before[e] = 0;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      hopper::init_barrier(b.landed + i, Format::kLoaded);
      hopper::init_barrier(b.empty + i, 8);  // a warp each
    }
    hopper::init_barrier(b.inputs_landed, kLoaders);
    hopper::init_barrier(b.inputs_empty, 8);
    hopper::publish_barriers();
    hopper::prefetch_map(&up_map);
    hopper::prefetch_map(&down_map);
  }
  __syncthreads();
  hopper::let_next_start();
  hopper::wait_for_previous();  // which experts' weights are wanted, only the ids say
  count_slots(p, tiles, reinterpret_cast<int32_t*>(memory + S::kTotalsAt), Format::Tile::kTokens);
  // From one lane, that the compiler sees that a warp agrees: descriptors then live in uniform registers.
  const int group = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0), warp = threadIdx.x / 32 % 4;
  if (group == 2) {
    hopper::give_registers<56>();
    if (warp > 0) {
      load_rest(memory, b, p, tiles, warp - 1);
      clear_rows(p, tiles.slots, warp - 1);
    } else if (threadIdx.x % 32 == 0) {
      load_weights(memory, b, p, tiles, &up_map, &down_map);
    }
  } else {
    hopper::take_registers<224>();
    compute(memory, b, p, tiles, group);
  }
}

}  // namespace n3::moe_experts::sm90
