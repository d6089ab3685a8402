// causal_conv1d_update: the convolution for the next tokens of running sequences, in the three uses of the state.
#pragma once
#include "conv1d_kernel.cuh"
#include "conv1d_update_plan.h"
#include "stage_kernel.cuh"

namespace n3::causal_conv1d {

enum class History : int32_t { kShift, kWindow, kRing };  // conv1d.h: Use

struct UpdateArgs {
  View x;               // strides: sequence, token, channel
  TapsView taps;
  View state;           // slot, channel, input
  History use;
  mamba::Slots slots;
  IndexView cache_seqlens;
  mamba::Staged states;
  View y;               // strides: sequence, token, channel
  int64_t kept, channel_blocks;
};

// What one thread knows of its sequence and channel; T is the dtype of x and of the state, whose bits are copied.
template <typename T>
struct Channel {
  const UpdateArgs& a;
  int64_t b, c, source, count;
  const T* history;     // column 0 of the state that is read
  int64_t stride;       // from column to column
  int64_t next;         // the column behind the newest input (of a ring: not yet modulo)

  N3_DEVICE Channel(const UpdateArgs& args, int64_t sequence, int64_t channel)
      : a(args), b(sequence), c(channel), source(args.slots.read(sequence)) {
    count = source < 0 ? 0 : a.slots.count(b);
    if (source < 0) return;
    if (a.states.holds(b)) {
      history = static_cast<const T*>(a.states.copies) + (b * a.taps.channels + c) * a.kept;
      stride = 1;
    } else {
      history = static_cast<const T*>(a.state.data) + offset(a.state, source, c);
      stride = a.state.strides[2];
    }
    next = a.kept;
    if (a.use == History::kWindow) {
      next = a.taps.width - 2 + mamba::clamp(a.slots.num_accepted(b), 1, a.slots.tokens);
    } else if (a.use == History::kRing) {
      next = a.cache_seqlens(b);
    }
  }

  N3_DEVICE int64_t column(int64_t i) const {
    if (a.use != History::kRing) return i;
    const int64_t m = i % a.kept;
    return m < 0 ? m + a.kept : m;
  }
  // The input `back` (1: the newest) before the first token.
  N3_DEVICE T before(int64_t back) const { return history[column(next - back) * stride]; }
  N3_DEVICE T token(int64_t t) const { return static_cast<const T*>(a.x.data)[offset(a.x, b, t, c)]; }
  // The input `back` (0: the token itself) before token t on its path.
  N3_DEVICE T on_path(int64_t t, int64_t back) const {
    if (a.slots.parents.data) {
      while (t >= 0 && back > 0) t = a.slots.parent(b, t), --back;
    } else {
      t -= back, back = t < 0 ? -1 - t : 0;
    }
    return t >= 0 ? token(t) : before(back + 1);
  }

  N3_DEVICE T* written(int64_t slot) const { return static_cast<T*>(a.state.data) + offset(a.state, slot, c); }

  // The last S inputs up to token t. In order: where the slot is the one that is read, column i comes from behind.
  N3_DEVICE void write_shift(int64_t t, int64_t slot) const {
    T* to = written(slot);
    for (int64_t i = 0; i < a.kept; ++i) to[i * a.state.strides[2]] = on_path(t, a.kept - 1 - i);
  }

  N3_DEVICE void write_states() const {
    if (source < 0) return;
    if (a.use == History::kRing) {
      for (int64_t t = count > a.kept ? count - a.kept : 0; t < count; ++t) {
        written(source)[column(next + t) * a.state.strides[2]] = token(t);
      }
      return;
    }
    if (a.use == History::kWindow) {
      const int64_t slot = a.slots.written(b, count - 1, count, source), width = a.taps.width;
      if (slot < 0 || (count == 0 && slot == source)) return;
      T* to = written(slot);
      const int64_t columns = count == 0 ? a.kept : width - 2 + count;
      for (int64_t i = 0; i < columns; ++i) {
        const int64_t t = i - (width - 2);  // a token of this call, or an input before
        to[i * a.state.strides[2]] = count == 0 ? history[i * stride] : t < 0 ? before(-t) : token(t);
      }
      return;
    }
    int64_t own = -2;  // the token whose state goes to the slot that is read: last, for the others still read it
    for (int64_t t = count == 0 ? -1 : 0; t < count || t < 0; ++t) {
      const int64_t slot = a.slots.written(b, t, count, source);
      if (slot == source) {
        own = t;
      } else if (slot >= 0) {
        write_shift(t, slot);
      }
    }
    if (own >= -1) write_shift(own, source);
  }

  // The sums of the tokens, given to emit(token, y): 0 for padding.
  template <typename Emit>
  N3_DEVICE void convolve(Emit emit) const {
    const int64_t width = a.taps.width, past = width - 1;
    const float first = a.taps.first(c);
    if (width <= kFewTaps && !a.slots.parents.data) {  // a window in registers, window[k] for tap k
      float window[kFewTaps], tap[kFewTaps];
#pragma unroll
      for (int k = 0; k < kFewTaps; ++k) {
        tap[k] = k < width ? a.taps.tap(c, k) : 0.f;
        if (k > 0) window[k] = k <= past && count > 0 ? device::widen(before(past - k + 1)) : 0.f;
      }
      for (int64_t t = 0; t < count; ++t) {
        float sum = first;
        const float newest = device::widen(token(t));
#pragma unroll
        for (int k = 0; k < kFewTaps; ++k) {
          if (k < past) {
            window[k] = window[k + 1 < kFewTaps ? k + 1 : k];
          } else if (k == past) {
            window[k] = newest;
          }
        }
#pragma unroll
        for (int k = 0; k < kFewTaps; ++k) {
          if (k < width) sum = fmaf(tap[k], window[k], sum);
        }
        emit(t, a.taps.last(sum));
      }
    } else {
      for (int64_t t = 0; t < count; ++t) {
        float sum = first;
        for (int64_t k = 0; k < width; ++k) sum = fmaf(a.taps.tap(c, k), device::widen(on_path(t, past - k)), sum);
        emit(t, a.taps.last(sum));
      }
    }
    for (int64_t t = count; t < a.slots.tokens; ++t) emit(t, 0.f);
  }
};

//   grid  batch * channel_blocks     block kUpdateThreads     smem  none
// A thread owns a channel of a sequence: it reads its history before it writes it. Blocks per SM: without, ptxas spills
// on sm_120.
template <typename T>
__global__ __launch_bounds__(kUpdateThreads, 4) void update_kernel(const UpdateArgs a) {
  const mamba::Digits at = mamba::digits(blockIdx.x, a.slots.batch, a.channel_blocks);
  const int64_t b = at.middle, c = at.inner * kUpdateThreads + threadIdx.x;
  if (c >= a.taps.channels) return;
  const Channel<T> channel(a, b, c);
  channel.convolve([&](int64_t t, float y) { mamba::store(a.y, offset(a.y, b, t, c), y); });
  channel.write_states();
}

}  // namespace n3::causal_conv1d
