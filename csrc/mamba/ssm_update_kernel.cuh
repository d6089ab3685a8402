// ssm_update: S_t = exp(A dt_t) S_{t-1} + dt_t x_t B_t^T, y_t = S_t C_t + D x_t, times silu(z_t).
#pragma once
#include "ssm_rows.cuh"
#include "ssm_update_plan.h"
#include "stage_kernel.cuh"

namespace n3::ssm_update {

using mamba::View;

// The limits of dt and what is added to it.
struct TimeStep {
  View dt, A, bias;  // strides: b, t, h; h; h. bias.data null: none
  bool softplus;
  float low, high;

  N3_DEVICE float step(int64_t b, int64_t t, int64_t h) const {
    const float raw = mamba::load(dt, offset(dt, b, t, h));
    return mamba::time_step(bias.data ? raw + mamba::load(bias, h * bias.strides[0]) : raw, softplus, low, high);
  }
  N3_DEVICE float decay(int64_t h, float step) const { return expf(mamba::load(A, h * A.strides[0]) * step); }
};

struct Args {
  View state, scale;  // [slots, H, P, N] and, of 8-bit states, [slots, H, P]
  View x, z;          // strides: b, t, h, p; z.data null: no gate
  View B, C;          // strides: b, t, g, n
  View D;             // strides: h, p; data null: none
  View y;             // strides: b, t, h, p
  TimeStep time;
  mamba::Slots slots;
  mamba::Staged states, scales;
  mamba::Rounding rounding;
  int64_t heads, heads_per_group, head_dim, d_state, tiles;
  bool vectors;       // rows of states can be read 4 elements at a time
};

// The order in which the tokens of a sequence are stepped through. A chain: each once. A tree: where a token does not
// continue the one before, its path is walked again from the state that was read, and only its end is new.
struct Steps {
  int64_t token = 0;  // the next one that is new
  int64_t at = -1;    // where the path stands

  // The next step; `restart`: from the state that was read.
  N3_DEVICE int64_t next(const mamba::Slots& slots, int64_t b, bool& restart) {
    int64_t step = token;
    for (;;) {  // the token after `at` on the path to `token`; -1 is on every path
      const int64_t parent = slots.parent(b, step);
      if (parent == at) break;
      if (parent < at) {  // `at` is on another path
        at = -1, step = token;
        continue;
      }
      step = parent;
    }
    restart = at < 0;
    at = step;
    if (step == token) ++token;
    return step;
  }
};

// The state's row (slot, h, p), and the number of its first element in a contiguous state.
template <typename State>
N3_DEVICE State* row_of(const Args& a, int64_t slot, int64_t h, int64_t p) {
  return static_cast<State*>(a.state.data) + offset(a.state, slot, h, p);
}

template <typename State, typename RowT>
N3_DEVICE void read_row(const Args& a, int64_t b, int64_t slot, int64_t h, int64_t p, int lane, RowT& row) {
  const int64_t staged = (b * a.heads + h) * a.head_dim + p;
  float scale = 1.f;
  if (a.states.holds(b)) {
    if constexpr (mamba::kScaled<State>) scale = static_cast<const float*>(a.scales.copies)[staged];
    const State* from = static_cast<const State*>(a.states.copies) + staged * a.d_state;
    row.template read<State>(from, {a.d_state, 1}, lane, scale);
  } else {
    if constexpr (mamba::kScaled<State>) scale = static_cast<const float*>(a.scale.data)[offset(a.scale, slot, h, p)];
    row.template read<State>(row_of<State>(a, slot, h, p), {a.d_state, a.state.strides[3]}, lane, scale);
  }
}

// Every lane of a warp must call; rows that are not `active` are not written.
template <typename State, typename RowT>
N3_DEVICE void write_row(const Args& a, int64_t slot, int64_t h, int64_t p, int lane, bool active, int64_t token,
                         const RowT& row) {
  const mamba::RowShape shape{a.d_state, a.state.strides[3]};
  float scale = 1.f;
  if constexpr (mamba::kScaled<State>) {
    scale = row.template scale_for<State>(shape, lane);
    if (active && lane == 0) static_cast<float*>(a.scale.data)[offset(a.scale, slot, h, p)] = scale;
  }
  if (!active) return;
  const int64_t element = ((slot * a.heads + h) * a.head_dim + p) * a.d_state;
  row.template write<State>(row_of<State>(a, slot, h, p), shape, lane, scale, a.rounding, element, token);
}

// y = (sum + D x) silu(z).
N3_DEVICE float finish(const View& D, const View& z, int64_t b, int64_t t, int64_t h, int64_t p, float x, float sum) {
  if (D.data) sum = fmaf(mamba::load(D, offset(D, h, p)), x, sum);
  return z.data ? sum * mamba::silu(mamba::load(z, offset(z, b, t, h, p))) : sum;
}

// Left to itself ptxas aims at 128 registers, and spills where it cannot.
template <typename State, typename RowT, bool kTree>
constexpr int blocks_per_sm() {
  return RowT::kWidth > 512 ? 2 : kTree || mamba::kScaled<State> ? 3 : 5;
}

//   grid  plan().blocks: batch, heads, tiles of kThreads / kThreadsOfRow rows     block kThreads
//   smem  B and C of tile_steps() steps in float32, and their dt, decay and x
// The state is read once and kept in registers through all tokens. kTree: a second copy of it, to start paths from.
template <typename State, typename RowT, bool kTree>
__global__ __launch_bounds__(kThreads, blocks_per_sm<State, RowT, kTree>()) void update_kernel(const Args a) {
  constexpr int kLanes = RowT::kThreadsOfRow, kRows = kThreads / kLanes;
  constexpr int kWidth = RowT::kWidth, kSteps = tile_steps(kWidth);
  alignas(16) __shared__ float B[kSteps][kWidth], C[kSteps][kWidth];
  __shared__ float dt[kSteps], decay[kSteps], x[kSteps][kRows];
  __shared__ int64_t token_of[kSteps];
  __shared__ bool restarts[kSteps];
  __shared__ int filled;

  const mamba::Digits at = mamba::digits(blockIdx.x, a.heads, a.tiles);
  const int64_t tile = at.inner, h = at.middle, b = at.outer;
  const int lane = threadIdx.x % kLanes, r = threadIdx.x / kLanes;
  const int64_t p = tile * kRows + r, g = uint32_t(h) / uint32_t(a.heads_per_group);
  const bool active = p < a.head_dim;
  const int64_t source = a.slots.read(b), count = source < 0 ? 0 : a.slots.count(b);
  for (int64_t t = count; t < a.slots.tokens; ++t) {
    if (active && lane == 0) mamba::store(a.y, offset(a.y, b, t, h, p), 0.f);
  }
  if (source < 0) return;

  RowT row, before;
  const mamba::RowShape shape{a.d_state, 1};
  read_row<State>(a, b, source, h, active ? p : 0, lane, row);
  if constexpr (kTree) before = row;
  if (count == 0) {
    const int64_t slot = a.slots.written(b, -1, 0, source);
    if (slot >= 0) write_row<State>(a, slot, h, p, lane, active, 0, row);
    return;
  }

  Steps steps;  // of thread 0
  for (int64_t done = 0; done < count;) {
    __syncthreads();
    if (threadIdx.x == 0) {
      int i = 0;
      for (; i < kSteps && steps.token < count; ++i) token_of[i] = steps.next(a.slots, b, restarts[i]);
      filled = i;
    }
    __syncthreads();
    const int n = filled;
    for (int i = threadIdx.x; i < n * kWidth; i += kThreads) {
      const int64_t t = token_of[i / kWidth], k = i % kWidth;
      B[i / kWidth][k] = k < a.d_state ? mamba::load(a.B, offset(a.B, b, t, g, k)) : 0.f;
      C[i / kWidth][k] = k < a.d_state ? mamba::load(a.C, offset(a.C, b, t, g, k)) : 0.f;
    }
    for (int i = threadIdx.x; i < n * kRows; i += kThreads) {
      const int64_t channel = tile * kRows + i % kRows;
      x[i / kRows][i % kRows] =
          channel < a.head_dim ? mamba::load(a.x, offset(a.x, b, token_of[i / kRows], h, channel)) : 0.f;
    }
    for (int i = threadIdx.x; i < n; i += kThreads) {
      dt[i] = a.time.step(b, token_of[i], h);
      decay[i] = a.time.decay(h, dt[i]);
    }
    __syncthreads();
    for (int i = 0; i < n; ++i) {
      const int64_t t = token_of[i];
      if constexpr (kTree) {
        if (restarts[i]) row = before;
      }
      row.advance(decay[i], dt[i] * x[i][r], B[i], shape, lane);
      if (t < done) continue;  // on the way to another token
      done = t + 1;
      const float sum = row.dot(C[i], shape, lane);
      if (active && lane == 0) {
        mamba::store(a.y, offset(a.y, b, t, h, p), finish(a.D, a.z, b, t, h, p, x[i][r], sum));
      }
      const int64_t slot = a.slots.written(b, t, count, source);
      if (slot >= 0) write_row<State>(a, slot, h, p, lane, active, t, row);
    }
  }
}

}  // namespace n3::ssm_update
