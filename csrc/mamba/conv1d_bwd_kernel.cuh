// The gradient of causal_conv1d. With pre = the sum before the activation and dpre = grad_y act'(pre),
//   dx_t = sum_k weight[k] dpre_{t+W-1-k}   dweight[k] = sum_t dpre_t x_{t-W+1+k}   dbias = sum_t dpre_t
// where inputs before the first token are those of the initial state, and grad_final_state is added to the last W - 1.
#pragma once
#include "conv1d_kernel.cuh"

namespace n3::causal_conv1d {

struct BackwardArgs {
  Args forward;             // y and final unused; kept = W - 1
  View grad_y, grad_final;  // strides: sequence, token, channel; sequence, channel, input; grad_final.data null: none
  void *dx, *d_initial;     // contiguous [tokens, C], [sequences, C, W - 1]; d_initial null: not wanted
  float* partial;           // [pieces, W + 1, C]
  int64_t tokens_each;      // of a piece
};

N3_DEVICE float silu_slope(float v) {
  const float s = 1.f / (1.f + expf(-v));
  return s * fmaf(v, 1.f - s, 1.f);
}

// kVector neighbouring elements.
template <typename T, int kVector>
N3_DEVICE void load_neighbours(const T* from, float (&v)[kVector]) {
  if constexpr (kVector == 1) {
    v[0] = device::widen(*from);
  } else if constexpr (sizeof(T) == 4) {
    mamba::load_vector(from, v);
  } else {
    const uint2 u = *reinterpret_cast<const uint2*>(from);
    v[0] = device::widen(T{uint16_t(u.x)}), v[1] = device::widen(T{uint16_t(u.x >> 16)});
    v[2] = device::widen(T{uint16_t(u.y)}), v[3] = device::widen(T{uint16_t(u.y >> 16)});
  }
}

// The inputs and gradients of a sequence at channels c ..; positions count packed tokens, those of the initial state lie
// before span.begin.
template <typename T, int kVector>
struct Channels {
  const BackwardArgs& b;
  Span span;
  int64_t slot, c;

  N3_DEVICE int64_t token_of(int64_t t) const { return b.forward.cu_seqlens.data ? t : t - span.begin; }
  N3_DEVICE void input(int64_t t, float (&v)[kVector]) const {
    if (t >= span.begin) {
      const View& x = b.forward.x;
      return load_neighbours(static_cast<const T*>(x.data) + offset(x, span.s, token_of(t), c), v);
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = device::widen(input_at<T>(b.forward, span, slot, t, c + i));
  }
  N3_DEVICE void gradient(int64_t t, float (&v)[kVector]) const {
    load_neighbours(static_cast<const T*>(b.grad_y.data) + offset(b.grad_y, span.s, token_of(t), c), v);
  }
  // What grad_final_state adds to the gradient of input t, and where that goes.
  N3_DEVICE float from_final(int64_t t, int i) const {
    const int64_t column = t - (span.end - b.forward.kept);
    if (!b.grad_final.data || column < 0) return 0.f;
    return device::widen(static_cast<const T*>(b.grad_final.data)[offset(b.grad_final, span.s, c + i, column)]);
  }
  N3_DEVICE void store(int64_t t, const float (&dx)[kVector]) const {
    const int64_t channels = b.forward.taps.channels, kept = b.forward.kept;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      T* to = t >= span.begin ? static_cast<T*>(b.dx) + t * channels + c + i
                              : static_cast<T*>(b.d_initial) + (span.s * channels + c + i) * kept + t - span.begin + kept;
      *to = device::narrow<T>(dx[i]);
    }
  }
};

// The gradients of a thread's channels, of kWidth taps: what the last kWidth tokens need stays in registers.
template <typename T, int kVector, int kWidth>
struct Slide {
  float tap[kWidth][kVector], first[kVector];
  float dweight[kWidth][kVector], dbias[kVector];

  N3_DEVICE Slide(const TapsView& taps, int64_t c) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      first[i] = taps.first(c + i), dbias[i] = 0.f;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) tap[k][i] = taps.tap(c + i, k), dweight[k][i] = 0.f;
    }
  }

  // Writes the gradients of inputs from .. to and adds what those that are tokens give of the taps'.
  N3_DEVICE void run(const Channels<T, kVector>& at, int64_t from, int64_t to) {
    constexpr int kPast = kWidth - 1;
    const int64_t begin = from < at.span.begin ? at.span.begin : from;
    float window[kWidth][kVector], slope[kWidth][kVector];  // inputs and dpre of tokens t - kPast .. t
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) window[k][i] = slope[k][i] = 0.f;
      if (k > 0 && begin < at.span.end) at.input(begin - kWidth + k, window[k]);
    }
    for (int64_t t = begin; t < to + kPast; ++t) {
#pragma unroll
      for (int k = 0; k < kPast; ++k) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) window[k][i] = window[k + 1][i], slope[k][i] = slope[k + 1][i];
      }
      if (t < at.span.end) {
        differentiate(at, t, window, slope[kPast]);
        if (t < to) add(window, slope[kPast]);
      } else {
#pragma unroll
        for (int i = 0; i < kVector; ++i) slope[kPast][i] = 0.f;
      }
      if (t - kPast < from) continue;
      float dx[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        dx[i] = at.from_final(t - kPast, i);
#pragma unroll
        for (int k = 0; k < kWidth; ++k) dx[i] = fmaf(tap[k][i], slope[kPast - k][i], dx[i]);
      }
      at.store(t - kPast, dx);
    }
  }

 private:
  N3_DEVICE void differentiate(const Channels<T, kVector>& at, int64_t t, float (&window)[kWidth][kVector],
                               float (&dpre)[kVector]) const {
    at.input(t, window[kWidth - 1]);
    at.gradient(t, dpre);
    if (!at.b.forward.taps.silu) return;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      float pre = first[i];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) pre = fmaf(tap[k][i], window[k][i], pre);
      dpre[i] *= silu_slope(pre);
    }
  }

  N3_DEVICE void add(const float (&window)[kWidth][kVector], const float (&dpre)[kVector]) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      dbias[i] += dpre[i];
#pragma unroll
      for (int k = 0; k < kWidth; ++k) dweight[k][i] = fmaf(dpre[i], window[k][i], dweight[k][i]);
    }
  }
};

// The same for one channel and any number of taps: everything is read again, from the caches, and computed anew; the
// sums are those in memory.
template <typename T>
struct Slide<T, 1, 0> {
  float* sums;  // [W + 1] rows of C, this channel's
  int64_t channels;

  N3_DEVICE void run(const Channels<T, 1>& at, int64_t from, int64_t to) {
    const TapsView& taps = at.b.forward.taps;
    for (int64_t j = from; j < to; ++j) {
      float dx[1] = {at.from_final(j, 0)};
      for (int64_t k = 0; k < taps.width; ++k) {
        const int64_t t = j + taps.width - 1 - k;
        if (t < at.span.end && t >= at.span.begin) dx[0] = fmaf(taps.tap(at.c, k), differentiate(at, t), dx[0]);
      }
      at.store(j, dx);
      if (j < at.span.begin) continue;
      const float dpre = differentiate(at, j);
      for (int64_t k = 0; k < taps.width; ++k) {
        float x[1];
        at.input(j - taps.width + 1 + k, x);
        sums[k * channels] = fmaf(dpre, x[0], sums[k * channels]);
      }
      sums[taps.width * channels] += dpre;
    }
  }

 private:
  N3_DEVICE float differentiate(const Channels<T, 1>& at, int64_t t) const {
    const TapsView& taps = at.b.forward.taps;
    float dy[1], pre = taps.first(at.c);
    at.gradient(t, dy);
    if (!taps.silu) return dy[0];
    for (int64_t k = 0; k < taps.width; ++k) {
      float x[1];
      at.input(t - taps.width + 1 + k, x);
      pre = fmaf(taps.tap(at.c, k), x[0], pre);
    }
    return dy[0] * silu_slope(pre);
  }
};

// Tokens from .. to: the parts of sequences, and zeros behind the last one.
template <typename T, int kVector, typename S>
N3_DEVICE void run_tokens(const BackwardArgs& b, int64_t c, int64_t from, int64_t to, S& slide) {
  while (from < to) {
    const Span span = span_at(b.forward, from);
    const int64_t end = span.end < to ? span.end : to;
    if (span.s < b.forward.sequences) {
      slide.run(Channels<T, kVector>{b, span, span.s, c}, from, end);
    } else {
      const float zeros[kVector] = {};
      for (; from < end; ++from) Channels<T, kVector>{b, span, -1, c}.store(from, zeros);
    }
    from = end;
  }
}

//   grid  backward_plan().blocks: pieces of the tokens, then sequences, for their initial states; for each the blocks of
//         kThreads * kVector channels     block kThreads     smem  none
// A thread slides along the tokens of its channels, W - 1 beyond the piece's for dx, whose dpre a neighbour computes too.
// kWidth: taps, 0: any number. Blocks per SM: without, ptxas spills a word or two for more of them.
template <typename T, int kVector, int kWidth>
__global__ __launch_bounds__(kThreads, kVector > 1 ? 4 : 6) void backward_kernel(const BackwardArgs b) {
  const Args& a = b.forward;
  const int64_t part = blockIdx.x / a.channel_blocks, channels = a.taps.channels;
  const int64_t c = (int64_t(blockIdx.x % a.channel_blocks) * kThreads + threadIdx.x) * kVector;
  if (c >= channels) return;
  const int64_t from = part * b.tokens_each, to = from + b.tokens_each < a.tokens ? from + b.tokens_each : a.tokens;
  float* sums = b.partial + part * (a.taps.width + 1) * channels + c;
  if constexpr (kWidth == 0) {
    Slide<T, 1, 0> slide{sums, channels};
    if (part >= a.tiles) {
      const Span span = span_of(a, part - a.tiles);
      return slide.run(Channels<T, 1>{b, span, span.s, c}, span.begin - a.kept, span.begin);
    }
    for (int64_t k = 0; k <= a.taps.width; ++k) sums[k * channels] = 0.f;
    run_tokens<T, 1>(b, c, from, to, slide);
  } else {
    Slide<T, kVector, kWidth> slide(a.taps, c);
    if (part >= a.tiles) {
      const Span span = span_of(a, part - a.tiles);
      return slide.run(Channels<T, kVector>{b, span, span.s, c}, span.begin - a.kept, span.begin);
    }
    run_tokens<T, kVector>(b, c, from, to, slide);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sums[k * channels + i] = slide.dweight[k][i];
      sums[kWidth * channels + i] = slide.dbias[i];
    }
  }
}

}  // namespace n3::causal_conv1d
