// ssm_replay_*: decoding from an older state and a ring of the tokens since.
#pragma once
#include "ssm_replay_plan.h"
#include "ssm_update_kernel.cuh"

namespace n3::ssm_replay {

using mamba::View;

struct RingView {
  View x, B, dt;  // [slots, R, H, P], [slots, R, G, N], [slots, R, H] float32
  View pos;       // [slots, 2] int32: start, count
  int64_t size;   // R

  N3_DEVICE int32_t* at(int64_t slot) const { return static_cast<int32_t*>(pos.data) + slot * pos.strides[0]; }
  N3_DEVICE int64_t start(int64_t slot) const { return *at(slot); }
  N3_DEVICE int64_t count(int64_t slot) const { return mamba::clamp(at(slot)[pos.strides[1]], 0, size); }
  // The entry of the i-th token from the start on.
  N3_DEVICE int64_t entry(int64_t start, int64_t i) const {
    const int64_t e = (start + i) % size;
    return e < 0 ? e + size : e;
  }
};

struct Args {
  ssm_update::Args ssm;  // of a flush: no tokens
  RingView ring;
  bool flush;            // fold whatever is committed
};

//   grid  ssm_update's plan: batch, heads, tiles of rows     block kThreads of ssm_update
//   smem  as ssm_update
// ssm_update's recurrence over the committed entries of the ring and then over the call's tokens, with the state read
// once and written only where a fold is due; the tokens are left in the ring. A block reads committed entries and
// writes others, so the blocks of a sequence need not wait for each other.
template <typename State, typename RowT, bool kTree>
__global__ __launch_bounds__(ssm_update::kThreads, ssm_update::blocks_per_sm<State, RowT, true>()) void replay_kernel(
    const Args args) {
  constexpr int kThreads = ssm_update::kThreads, kLanes = RowT::kThreadsOfRow, kWidth = RowT::kWidth;
  constexpr int kSteps = ssm_update::tile_steps(kWidth), kRows = kThreads / kLanes;
  alignas(16) __shared__ float B[kSteps][kWidth], C[kSteps][kWidth];
  __shared__ float dt[kSteps], decay[kSteps], x[kSteps][kRows];
  __shared__ int64_t token_of[kSteps], entry_of[kSteps];  // token -1: a committed entry
  __shared__ bool restarts[kSteps];
  __shared__ int filled;

  const ssm_update::Args& a = args.ssm;
  const RingView& ring = args.ring;
  const mamba::Digits at = mamba::digits(blockIdx.x, a.heads, a.tiles);
  const int64_t tile = at.inner, h = at.middle, b = at.outer;
  const int lane = threadIdx.x % kLanes, r = threadIdx.x / kLanes;
  const int64_t p = tile * kRows + r, g = uint32_t(h) / uint32_t(a.heads_per_group), tokens = a.slots.tokens;
  const bool active = p < a.head_dim;
  const int64_t slot = a.slots.read(b);
  if (slot < 0) {
    for (int64_t t = 0; t < tokens; ++t) {
      if (active && lane == 0) mamba::store(a.y, offset(a.y, b, t, h, p), 0.f);
    }
    return;
  }
  const int64_t start = ring.start(slot), committed = ring.count(slot), steps_all = committed + tokens;
  const bool fold = args.flush ? committed > 0 : folds(committed, tokens, ring.size);
  if (steps_all == 0) return;

  RowT row, before;
  const mamba::RowShape shape{a.d_state, 1};
  ssm_update::read_row<State>(a, b, slot, h, active ? p : 0, lane, row);
  ssm_update::Steps steps;  // of thread 0, as the next entry
  int64_t entry = 0, replayed = 0;
  for (int64_t done = 0; replayed < committed || done < tokens;) {
    __syncthreads();
    if (threadIdx.x == 0) {
      int i = 0;
      for (; i < kSteps && (entry < committed || steps.token < tokens); ++i) {
        if (entry < committed) {
          token_of[i] = -1, entry_of[i] = ring.entry(start, entry++), restarts[i] = false;
        } else {
          token_of[i] = steps.next(a.slots, b, restarts[i]);
          entry_of[i] = ring.entry(start, committed + token_of[i]);
        }
      }
      filled = i;
    }
    __syncthreads();
    const int n = filled;
    for (int i = threadIdx.x; i < n * kWidth; i += kThreads) {
      const int64_t t = token_of[i / kWidth], e = entry_of[i / kWidth], k = i % kWidth;
      float value = 0.f, other = 0.f;
      if (k < a.d_state && t < 0) {
        value = mamba::load(ring.B, offset(ring.B, slot, e, g, k));
      } else if (k < a.d_state) {
        value = mamba::load(a.B, offset(a.B, b, t, g, k));
        other = mamba::load(a.C, offset(a.C, b, t, g, k));
        if (tile == 0 && h % a.heads_per_group == 0) mamba::store(ring.B, offset(ring.B, slot, e, g, k), value);
      }
      B[i / kWidth][k] = value, C[i / kWidth][k] = other;
    }
    for (int i = threadIdx.x; i < n * kRows; i += kThreads) {
      const int64_t t = token_of[i / kRows], e = entry_of[i / kRows], channel = tile * kRows + i % kRows;
      float value = 0.f;
      if (channel < a.head_dim && t < 0) {
        value = mamba::load(ring.x, offset(ring.x, slot, e, h, channel));
      } else if (channel < a.head_dim) {
        value = mamba::load(a.x, offset(a.x, b, t, h, channel));
        mamba::store(ring.x, offset(ring.x, slot, e, h, channel), value);
      }
      x[i / kRows][i % kRows] = value;
    }
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const int64_t t = token_of[i], at = offset(ring.dt, slot, entry_of[i], h);
      dt[i] = t < 0 ? mamba::load(ring.dt, at) : a.time.step(b, t, h);
      if (t >= 0 && tile == 0) mamba::store(ring.dt, at, dt[i]);
      decay[i] = a.time.decay(h, dt[i]);
    }
    __syncthreads();
    for (int i = 0; i < n; ++i) {
      const int64_t t = token_of[i];
      if (t >= 0 && done == 0) {  // the first token: the state is that of what is committed
        if (fold) ssm_update::write_row<State>(a, slot, h, p, lane, active, 0, row);
        if constexpr (kTree) before = row;
      }
      if constexpr (kTree) {
        if (t >= 0 && restarts[i]) row = before;
      }
      row.advance(decay[i], dt[i] * x[i][r], B[i], shape, lane);
      if (t < 0) {
        ++replayed;
        continue;
      }
      if (t < done) continue;  // on the way to another token
      done = t + 1;
      const float sum = row.dot(C[i], shape, lane);
      if (active && lane == 0) {
        mamba::store(a.y, offset(a.y, b, t, h, p), ssm_update::finish(a.D, a.z, b, t, h, p, x[i][r], sum));
      }
    }
  }
  if (fold && tokens == 0) ssm_update::write_row<State>(a, slot, h, p, lane, active, 0, row);
}

struct MoveArgs {
  RingView ring;
  mamba::IndexView source;        // (b); data null: slot b
  mamba::IndexView num_accepted;  // (b)
  mamba::IndexView path;          // (b, t), rising
  int64_t batch, slots, tokens, heads, head_dim, groups, d_state, blocks;

  N3_DEVICE int64_t slot_of(int64_t b) const {
    const int64_t slot = source(b);
    return slot < slots && slot >= 0 ? slot : -1;
  }
  N3_DEVICE int64_t accepted(int64_t b) const { return mamba::clamp(num_accepted(b), 0, tokens); }
};

// Accepted tokens of a tree to the front of the entries that update wrote.
//   grid  batch * blocks     block kMoveThreads, a thread per value of an entry     smem  none
// The path rises: a value is read before another is moved onto it, both by one thread.
template <int kThreads>
__global__ __launch_bounds__(kThreads) void move_kernel(const MoveArgs a) {
  const mamba::Digits at = mamba::digits(blockIdx.x, a.batch, a.blocks);
  const int64_t b = at.middle, i = at.inner * kThreads + threadIdx.x, slot = a.slot_of(b);
  const int64_t of_x = a.heads * a.head_dim, of_B = a.groups * a.d_state;
  if (slot < 0 || i >= of_x + of_B + a.heads) return;
  const View& ring = i < of_x ? a.ring.x : i < of_x + of_B ? a.ring.B : a.ring.dt;
  const int64_t k = i < of_x ? i : i < of_x + of_B ? i - of_x : i - of_x - of_B;
  const int64_t size = i < of_x ? a.head_dim : i < of_x + of_B ? a.d_state : 1;
  const int64_t value = k / size * ring.strides[2] + k % size * ring.strides[3] + slot * ring.strides[0];
  const int64_t behind = a.ring.start(slot) + a.ring.count(slot);
  for (int64_t j = 0; j < a.accepted(b); ++j) {
    const int64_t from = a.ring.entry(behind, a.path(b, j)), to = a.ring.entry(behind, j);
    if (from != to) {
      mamba::store(ring, value + to * ring.strides[1], mamba::load(ring, value + from * ring.strides[1]));
    }
  }
}

// The ring's position after a commit, or (tokens = 0) after a flush: a thread per sequence. A launch of its own, for
// every block of the one before reads it.
template <int kThreads>
__global__ __launch_bounds__(kThreads) void position_kernel(const MoveArgs a) {
  const int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t slot = b < a.batch ? a.slot_of(b) : -1;
  if (slot < 0) return;
  const int64_t start = a.ring.start(slot), count = a.ring.count(slot);
  const bool folded = a.tokens == 0 || folds(count, a.tokens, a.ring.size);
  int32_t* const pos = a.ring.at(slot);
  if (folded) pos[0] = int32_t(a.ring.entry(start, count));
  pos[a.ring.pos.strides[1]] = int32_t((folded ? 0 : count) + (a.tokens ? a.accepted(b) : 0));
}

}  // namespace n3::ssm_replay
