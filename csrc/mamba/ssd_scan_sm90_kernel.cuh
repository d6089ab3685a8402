// ssd_scan on sm_90: all chunks of a head in one block, the state in registers from the first token to the last.
//
// Per tile (a head, or kP of its channels) and chunk of 64 tokens i, j, with S the state that enters, float32:
//   M_ij = (C_i . B_j) decay_ij dt_j  for j <= i, else 0            product 1, rounded to 16 bits in registers
//   Y    = start_i (C S^T) + M x                                    products 2 and 3, S rounded to 16 bits
//   S^T <- whole S^T + B^T (end_j x_j)                              product 4, end_j x_j rounded to 16 bits
//   y    = (Y + D x) silu(z)
// All four accumulate in float32. With float16 inputs, what is rounded must stay below 65504: beyond, it is infinite,
// and the result with it; of mamba::Saturated it is 65504. The factors are those of ssd_scan_decay.h: a warp holds rows
// 16 w .. 16 w + 15 of M, which are block w, so that every column block is wholly before, in or behind it.
#pragma once
#include "ssd_scan_sm90_helpers.cuh"
#include "ssd_scan_sm90_tile.cuh"

namespace n3::ssd_scan::sm90 {

// The states after chosen tokens of this chunk: what the last token of a sequence that ended there would leave, by the
// same operations on a copy, 64 dimensions at a time. The copy passes through the scratch: so the weighted x is made
// anew each time, and the 16-bit state at the end.
template <typename T, typename Tile>
N3_DEVICE void store_checkpoints(const Problem& p, const State<Tile>& s, const Decays& d, const char* b, const char* x,
                                 char* narrow_state, char* weighted, float* scratch, const Job& job, int32_t chunk,
                                 int barrier) {
  const int first = job.tokens.row + chunk * kTokens, valid = job.tokens.length - chunk * kTokens;
  bool any = false;
  for (int from = 0; from < p.checkpoints; from += 32) {
    const int mine = from + threadIdx.x % 32;
    const int64_t after = mine < p.checkpoints ? p.checkpoint_tokens(mine) - first : -1;
    const bool here = after >= 0 && after < kTokens && after < valid && slot_of(p, p.checkpoint_indices, mine) >= 0;
    // Every warp asks the same questions: the warpgroup stays together.
    for (uint32_t found = __ballot_sync(0xffffffffu, here); found; found &= found - 1) {
      const int c = from + __ffs(found) - 1;
      const int last = int(p.checkpoint_tokens(c) - first);
      const float sum = d.a[last], whole = exp2f(sum);
      any = true;
#pragma unroll
      for (int m = 0; m < Tile::kSubtiles; ++m) {
        weight_tokens<T, Tile>(x, weighted, [&](int j) { return j <= last ? end_factor(d.a[j], sum, d.dt[j]) : 0.f; });
        hopper::fence_async();
        float copy[Tile::kP / 2];
#pragma unroll
        for (int i = 0; i < Tile::kP / 2; ++i) copy[i] = s[m][i] * whole;
        hopper::sync_warpgroup(barrier);
        hopper::pin(copy);
        hopper::fence_products();
        add_tokens<T, Tile>(copy, b, weighted, m);
        hopper::commit_products();
        hopper::wait_products<0>();
        hopper::pin(copy);
        hopper::sync_warpgroup(barrier);  // nobody reads the weighted x any more
        const int32_t slot = slot_of(p, p.checkpoint_indices, c);
        store_block<Tile::kP>(p, copy, state_rows(p.final, job, slot, m), scratch);
        hopper::sync_warpgroup(barrier);
      }
    }
  }
  if (!any) return;
  publish_state<T, Tile>(s, narrow_state);
  hopper::fence_async();
  hopper::sync_warpgroup(barrier);
}

template <typename T, typename Tile>
N3_DEVICE void scan_tiles(char* memory, const Stages& stages, const Problem& p, int which) {
  using S = Shared<Tile>;
  using Products = hopper::Product<T, Tile::kP>;
  constexpr hopper::Major kK = hopper::Major::kK, kMN = hopper::Major::kMN;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, barrier = 1 + which;
  char* narrow_state = memory + S::state_at(which);
  char* weighted = memory + S::weighted_at(which);
  float* scratch = reinterpret_cast<float*>(narrow_state + warp * S::kScratch);
  float* skip = reinterpret_cast<float*>(memory + S::kSkipAt) + which * Tile::kP;
  Position<S::kStages> at;
  for (int32_t i = blockIdx.x; i < p.work.items; i += gridDim.x) {
    const Job job = job_at<Tile>(p, i, which);
    const int32_t chunks = job.tokens.chunks(), length = job.tokens.length, channels = job.channels;
    if (!job.tile.exists) {  // keeps step with the other warpgroup
      for (int32_t chunk = 0; chunk < chunks; ++chunk, at.next()) {
        hopper::wait(stages.ready + at.stage, at.parity);
        hopper::wait(stages.landed + at.stage, at.parity);
        if (lane == 0) hopper::arrive(stages.empty + at.stage);
      }
      continue;
    }
    if (job.tokens.slot < 0) {
      clear_tokens<T>(p, job);
      continue;
    }
    const bool given = p.initial.data && (!p.has_initial || p.has_initial[job.sequence * p.has_initial_stride]);
    State<Tile> s;
#pragma unroll
    for (int m = 0; m < Tile::kSubtiles; ++m) {
#pragma unroll
      for (int e = 0; e < Tile::kP / 2; ++e) s[m][e] = 0.f;
      if (given) load_block<Tile::kP>(p, s[m], state_rows(p.initial, job, job.tokens.slot, m), scratch);
    }
    if (chunks) {
      hopper::sync_warpgroup(barrier);  // the scratch is where the 16-bit state goes
      for (int c = threadIdx.x % 128; c < Tile::kP; c += 128) {
        const bool inside = p.D.data && c < channels;
        skip[c] = inside ? mamba::load(p.D, mamba::offset(p.D, job.tile.head, job.tile.channel + c)) : 0.f;
      }
      publish_state<T, Tile>(s, narrow_state);
      hopper::fence_async();
      hopper::sync_warpgroup(barrier);
    }
    // Of this warp's first token, chunk after chunk.
    const int64_t next = int64_t(p.heads) * p.head_dim, row = job.tokens.row + kBlock * warp;
    T* y_at = static_cast<T*>(p.y) + row * next + job.tile.head * p.head_dim + job.tile.channel;
    const T* z_at = static_cast<const T*>(p.z);
    if (z_at) {
      z_at += job.tokens.batch * p.z_strides[0] + (job.tokens.first + kBlock * warp) * p.z_strides[1] +
              job.tile.head * p.z_strides[2] + job.tile.channel;
    }
    for (int32_t chunk = 0; chunk < chunks; ++chunk, at.next()) {
      const int left = length - chunk * kTokens, valid = left < kTokens ? left : kTokens;
      const char* b = memory + S::b_at(at.stage);
      const char* c = memory + S::c_at(at.stage);
      char* x = memory + S::x_at(at.stage, which);
      const Decays& d = reinterpret_cast<const Decays*>(memory + S::kDecaysAt + at.stage * S::kDecays)[which];
      hopper::wait(stages.ready + at.stage, at.parity);
      hopper::wait(stages.landed + at.stage, at.parity);
      if (p.checkpoints) {
        store_checkpoints<T, Tile>(p, s, d, b, x, narrow_state, weighted, scratch,
                                   job_at<Tile>(p, hopper::forgotten(i), which), chunk, barrier);
      }

      float scores[32], y[Tile::kP / 2];
      hopper::fence_products();
#pragma unroll
      for (int k = 0; k < Tile::kN / 16; ++k) {
        hopper::Product<T, kTokens>::template shared<kK, kK>(scores, dimensions_at(c, k), dimensions_at(b, k), k > 0);
      }
      hopper::commit_products();
#pragma unroll
      for (int k = 0; k < Tile::kN / 16; ++k) {
        Products::template shared<kK, kMN>(y, dimensions_at(c, k), channels_at<Tile>(narrow_state, k, Tile::kN), k > 0);
      }
      hopper::commit_products();

      // Under the first two products: the operands of the fourth.
      weight_tokens<T, Tile>(x, weighted, [&](int j) { return d.end[j]; });
      hopper::fence_async();
      const float whole = d.whole;
#pragma unroll
      for (int m = 0; m < Tile::kSubtiles; ++m) {
#pragma unroll
        for (int e = 0; e < Tile::kP / 2; ++e) s[m][e] *= whole;
      }
      hopper::wait_products<1>();
      hopper::pin(scores);
      uint32_t m[4][4];
      decay_scores<T>(d, scores, m);
      const float start[2] = {d.start[kBlock * warp + lane / 4], d.start[kBlock * warp + 8 + lane / 4]};
      hopper::sync_warpgroup(barrier);  // all of the weighted x is there
      hopper::wait_products<0>();
      hopper::pin(y);
#pragma unroll
      for (int e = 0; e < Tile::kP / 2; ++e) y[e] *= start[e / 2 % 2];

      hopper::pin(y);
#pragma unroll
      for (int block = 0; block < Tile::kSubtiles; ++block) hopper::pin(s[block]);
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) hopper::pin(m[k]);
      hopper::fence_products();
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) {
        Products::template registers<kMN>(y, m[k], channels_at<Tile>(x, k, kTokens), true);
      }
      hopper::commit_products();
#pragma unroll
      for (int block = 0; block < Tile::kSubtiles; ++block) add_tokens<T, Tile>(s[block], b, weighted, block);
      hopper::commit_products();
      hopper::wait_products<1>();
      hopper::pin(y);
      hopper::sync_warpgroup(barrier);  // nobody reads x as an operand any more, nor the 16-bit state
      if (z_at) {
        finish_tokens<true, T, Tile>(y, x, skip, z_at, p.z_strides[1], valid, channels);
        z_at += kTokens * p.z_strides[1];
      } else {
        finish_tokens<false, T, Tile>(y, x, skip, nullptr, 0, valid, channels);
      }
      __syncwarp();
      store_tokens<T, Tile>(x, y_at, int64_t(p.heads) * p.head_dim, valid, channels);
      y_at += kTokens * (int64_t(p.heads) * p.head_dim);
      hopper::wait_products<0>();
#pragma unroll
      for (int block = 0; block < Tile::kSubtiles; ++block) hopper::pin(s[block]);
      if (chunk + 1 < chunks) publish_state<T, Tile>(s, narrow_state);
      hopper::fence_async();  // of the 16-bit state before product 2, of y in the place of x before the next copy
      __syncwarp();
      if (lane == 0) hopper::arrive(stages.empty + at.stage);
      hopper::sync_warpgroup(barrier);
    }
    const Job again = job_at<Tile>(p, hopper::forgotten(i), which);
#pragma unroll
    for (int m = 0; m < Tile::kSubtiles; ++m) {
      store_block<Tile::kP>(p, s[m], state_rows(p.final, again, again.tokens.slot, m), scratch);
    }
  }
}

//   grid  plan().blocks, at most one per multiprocessor     block  Tile::kThreads: kWarpgroups that compute, then one
//   whose warp 0 loads and whose warps 1, 2 make the decays   smem  Shared<Tile>, dynamic
// With two computing warpgroups, one's arithmetic runs beside the other's products; nothing else joins them but the
// stages that they share. 216 and 72 registers per thread are 504 for three threads, what 168 at the launch give.
template <typename T, typename Tile>
__global__ __launch_bounds__(Tile::kThreads, 1) void tensor_scan_kernel_sm90(
    const __grid_constant__ hopper::TensorMap x_map, const __grid_constant__ hopper::TensorMap b_map,
    const __grid_constant__ hopper::TensorMap c_map, const __grid_constant__ Problem p) {
  using S = Shared<Tile>;
  char* memory = hopper::shared_memory();
  auto* barriers = reinterpret_cast<hopper::Barrier*>(memory + S::kBarriersAt);
  const Stages stages{barriers, barriers + kMostStages, barriers + 2 * kMostStages};
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      hopper::init_barrier(stages.landed + i, 1);
      hopper::init_barrier(stages.ready + i, Tile::kWarpgroups);
      hopper::init_barrier(stages.empty + i, 4 * Tile::kWarpgroups);
    }
    hopper::publish_barriers();
  }
  hopper::let_next_start();
  hopper::wait_for_previous();
  __syncthreads();
  // From one lane, that the compiler sees that a warp agrees: descriptors then live in uniform registers.
  const int group = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0), warp = threadIdx.x / 32 % 4;
  if (group == Tile::kWarpgroups) {
    if constexpr (Tile::kWarpgroups == 2) hopper::give_registers<72>();
    if (warp == 0) {
      if (threadIdx.x % 32 == 0) load_operands<Tile>(memory, stages, p, &x_map, &b_map, &c_map);
    } else if (warp <= Tile::kWarpgroups) {
      prepare_decays<Tile>(memory, stages, p, warp - 1);
    }
  } else {
    if constexpr (Tile::kWarpgroups == 2) hopper::take_registers<216>();
    scan_tiles<T, Tile>(memory, stages, p, Tile::kWarpgroups == 1 ? 0 : group);
  }
}

}  // namespace n3::ssd_scan::sm90
