// causal_conv1d: y_t = act(bias + sum_k weight[:, k] * x_{t-W+1+k}) per channel; states are raw inputs.
#pragma once
#include "../common/hopper.cuh"
#include "conv1d_plan.h"
#include "views.cuh"

namespace n3::causal_conv1d {

using mamba::IndexView;
using mamba::View;

struct TapsView {
  View weight;  // strides: channel, tap
  View bias;    // stride: channel; data null: none
  int64_t channels, width;
  bool silu;

  N3_DEVICE float first(int64_t c) const { return bias.data ? mamba::load(bias, c * bias.strides[0]) : 0.f; }
  N3_DEVICE float tap(int64_t c, int64_t k) const { return mamba::load(weight, offset(weight, c, k)); }
  N3_DEVICE float last(float sum) const { return silu ? mamba::silu(sum) : sum; }
};

struct Args {
  View x;                      // strides: sequence, token, channel
  TapsView taps;
  View initial, final;         // [slots, C, S]; initial.data null: zeros
  IndexView state_indices;     // data null: states by sequence, not in slots
  View has_initial;            // bool; data null: all
  IndexView cu_seqlens;        // data null: every sequence has `length` tokens
  IndexView checkpoint_tokens, checkpoint_indices;
  void* y;                     // contiguous [tokens, C]; dtype of x, or Saturated
  int64_t sequences, tokens, length, kept, slots, checkpoints;
  uint32_t tiles, channel_blocks;  // of the grid
};

// Tokens [begin, end) of sequence s; behind the last sequence s = sequences: padding.
struct Span {
  int64_t s, begin, end;
};

N3_DEVICE Span span_at(const Args& a, int64_t token) {
  if (!a.cu_seqlens.data) {
    const int64_t s = a.length ? token / a.length : 0;
    return {s, s * a.length, (s + 1) * a.length};
  }
  int64_t low = 0, high = a.sequences;  // the first sequence that ends behind the token
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (a.cu_seqlens(middle + 1) > token) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  const int64_t begin = a.cu_seqlens(low);
  return {low, begin, low < a.sequences ? a.cu_seqlens(low + 1) : a.tokens};
}

N3_DEVICE Span span_of(const Args& a, int64_t s) {
  if (!a.cu_seqlens.data) return {s, s * a.length, (s + 1) * a.length};
  return {s, a.cu_seqlens(s), a.cu_seqlens(s + 1)};
}

// The slot of a sequence, -1 for padding.
N3_DEVICE int64_t slot_of(const Args& a, int64_t s) {
  if (s >= a.sequences) return -1;
  const int64_t slot = a.state_indices(s);
  return a.state_indices.data && slot >= a.slots ? -1 : slot;
}

N3_DEVICE bool starts_from_state(const Args& a, int64_t s) {
  const bool* has = static_cast<const bool*>(a.has_initial.data);
  return a.initial.data && (!has || has[s * a.has_initial.strides[0]]);
}

// Input `token` (packed number, from span.begin - S on) of channel c: a token, or what the state holds, or 0.
template <typename T>
N3_DEVICE T input_at(const Args& a, const Span& span, int64_t slot, int64_t token, int64_t c) {
  if (token >= span.begin) {
    return static_cast<const T*>(a.x.data)[offset(a.x, span.s, a.cu_seqlens.data ? token : token - span.begin, c)];
  }
  const int64_t column = a.kept + token - span.begin;
  if (!starts_from_state(a, span.s)) return T{};
  return static_cast<const T*>(a.initial.data)[offset(a.initial, slot, c, column)];
}

// The S inputs up to and with `last`, into a slot. In order: where the slot is the one they are read from, column i is
// read before it is written, for it comes from a column behind.
template <typename T>
N3_DEVICE void write_state(const Args& a, const Span& span, int64_t from, int64_t to, int64_t last, int64_t c) {
  for (int64_t i = 0; i < a.kept; ++i) {
    const T v = input_at<T>(a, span, from, last - a.kept + 1 + i, c);
    static_cast<T*>(a.final.data)[offset(a.final, to, c, i)] = v;
  }
}

// kVector neighbouring inputs of one token: 16 bytes, or one element.
template <typename T, int kVector>
N3_DEVICE void load_inputs(const Args& a, const Span& span, int64_t slot, int64_t token, int64_t c,
                           float (&v)[kVector]) {
  if constexpr (kVector == 1) {
    v[0] = device::widen(input_at<T>(a, span, slot, token, c));
  } else {
    if (token >= span.begin) {
      const T* from = static_cast<const T*>(a.x.data) +
                      offset(a.x, span.s, a.cu_seqlens.data ? token : token - span.begin, c);
      mamba::load_vector(from, v);
    } else {
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] = device::widen(input_at<T>(a, span, slot, token, c + i));
    }
  }
}

// The final state of a sequence in a slot, by one of kBlock threads for each channel; `block` counts those of all
// sequences. To be called when nobody reads the slots any more.
template <typename T, int kBlock>
N3_DEVICE void write_final_state(const Args& a, uint32_t block) {
  const int64_t s = block / a.channel_blocks;
  const int64_t c = int64_t(block % a.channel_blocks) * kBlock + threadIdx.x, slot = slot_of(a, s);
  if (c >= a.taps.channels || slot < 0) return;
  const Span span = span_of(a, s);
  write_state<T>(a, span, slot, slot, span.end - 1, c);
}

//   grid  plan().blocks: tiles of kTile tokens, then checkpoints, then (without slots) final states; for each the
//         blocks of kThreads * kVector channels
//   block kThreads     smem  none
// A thread slides along the tokens of its channels, with up to 4 taps the last inputs in registers (kFew); any more are
// read again, from the caches. With states in slots the final states are left to a later launch: the first tile of a
// sequence may still have to read the slot. Blocks per SM: without, ptxas spills on sm_100.
template <typename T, typename Y, int kVector, bool kFew>
__global__ __launch_bounds__(kThreads, kVector > 4 ? 3 : 6) void forward_kernel(const Args a) {
  hopper::let_next_start();
  hopper::wait_for_previous();
  const int64_t part = blockIdx.x / a.channel_blocks;
  const int64_t c = (int64_t(blockIdx.x % a.channel_blocks) * kThreads + threadIdx.x) * kVector;
  if (c >= a.taps.channels) return;
  if (part >= a.tiles) {
    const int64_t k = part - a.tiles;
    if (k < a.checkpoints) {
      const int64_t token = a.checkpoint_tokens(k), to = a.checkpoint_indices(k);
      if (token < 0 || token >= a.tokens || to < 0 || to >= a.slots) return;
      const Span span = span_at(a, token);
      const int64_t from = slot_of(a, span.s);
      if (from < 0) return;
      for (int i = 0; i < kVector; ++i) write_state<T>(a, span, from, to, token, c + i);
    } else {
      const int64_t s = k - a.checkpoints;
      const Span span = span_of(a, s);
      for (int i = 0; i < kVector; ++i) write_state<T>(a, span, s, s, span.end - 1, c + i);
    }
    return;
  }

  const int64_t width = a.taps.width, past = width - 1;
  float tap[kFewTaps][kVector], first[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    first[i] = a.taps.first(c + i);
    if constexpr (kFew) {
#pragma unroll
      for (int k = 0; k < kFewTaps; ++k) tap[k][i] = k < width ? a.taps.tap(c + i, k) : 0.f;
    }
  }
  const int64_t begin = part * kTile, end = begin + kTile < a.tokens ? begin + kTile : a.tokens;
  float window[kFewTaps][kVector];  // window[k] meets tap k; the newest is window[width - 1]
  Span span{0, 0, 0};
  int64_t slot = -1;
  for (int64_t t = begin; t < end; ++t) {
    float sum[kVector];
    if (t == begin || t >= span.end) {
      span = span_at(a, t), slot = slot_of(a, span.s);
      if constexpr (kFew) {
#pragma unroll
        for (int k = 0; k < kFewTaps - 1; ++k) {  // shifted down by one before its first use
          if (k < past && slot >= 0) load_inputs<T, kVector>(a, span, slot, t - past + k, c, window[k + 1]);
        }
      }
    }
    if (slot < 0) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum[i] = 0.f;
    } else if constexpr (kFew) {
#pragma unroll
      for (int k = 0; k < kFewTaps; ++k) {
        if (k < past) {
#pragma unroll
          for (int i = 0; i < kVector; ++i) window[k][i] = window[k + 1 < kFewTaps ? k + 1 : k][i];
        } else if (k == past) {
          load_inputs<T, kVector>(a, span, slot, t, c, window[k]);
        }
      }
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        sum[i] = first[i];
#pragma unroll
        for (int k = 0; k < kFewTaps; ++k) {
          if (k < width) sum[i] = fmaf(tap[k][i], window[k][i], sum[i]);
        }
        sum[i] = a.taps.last(sum[i]);
      }
    } else {
      static_assert(kFew || kVector == 1);
      sum[0] = first[0];
      for (int64_t k = 0; k < width; ++k) {
        sum[0] = fmaf(a.taps.tap(c, k), device::widen(input_at<T>(a, span, slot, t - past + k, c)), sum[0]);
      }
      sum[0] = a.taps.last(sum[0]);
    }
    Y* to = static_cast<Y*>(a.y) + t * a.taps.channels + c;
    if constexpr (kVector == 1) {
      *to = device::narrow<Y>(sum[0]);
    } else {
      mamba::store_vector(to, sum);
    }
  }
}

// The final states of sequences in slots, each by the threads that read its slot.
//   grid  sequences * channel_blocks     block kThreads     smem  none
template <typename T>
__global__ __launch_bounds__(kThreads) void final_kernel(const Args a) {
  write_final_state<T, kThreads>(a, blockIdx.x);
}

}  // namespace n3::causal_conv1d
