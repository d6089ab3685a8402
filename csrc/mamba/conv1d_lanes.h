// The convolution over rows of channels, compiled once per instruction set by a file that defines N3_LANES.
#pragma once
#include <algorithm>
#include <cstring>
#include <utility>

#include "../common/lanes.h"
#include "conv1d_kernels.h"

namespace n3::causal_conv1d {
namespace {

constexpr int kTokens = 4;  // outputs at a time: an input row is loaded once for them, and their SiLUs overlap

template <typename T>
N3_LANE_FN const T* row_of(const void* const* rows, int64_t i, int64_t c) {
  return static_cast<const T*>(rows[i]) + c;
}

// ---- forward

// kCount outputs of kLanes channels from c; the taps are in registers.
template <typename X, typename Y, int kWidth, int kCount>
N3_LANE_FN void outputs(const Fir& f, int64_t t, int64_t c) {
  F32 x[kCount + kWidth - 1], y[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount + kWidth - 1; ++i) x[i] = load(row_of<X>(f.x, t + i, c));
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) y[i] = load(f.bias + c);
#pragma GCC unroll 8
  for (int k = 0; k < kWidth; ++k) {
    const F32 w = load(f.weight + k * f.tap_stride + c);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) y[i] = fma(w, x[i + k], y[i]);
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) {
    store(static_cast<Y*>(f.y) + (t + i) * f.y_stride + c, f.silu ? silu(y[i]) : y[i]);
  }
}

// A line of each of the rows that come in with the next kTokens outputs, spread over the channels in it.
template <typename X, int kWidth>
N3_LANE_FN void ask_for_next(const Fir& f, int64_t t, int64_t c) {
  constexpr int64_t kSteps = std::max<int64_t>(1, 64 / int64_t(kLanes * sizeof(X)));  // over the channels of a line
  constexpr int64_t kEach = (kTokens + kSteps - 1) / kSteps;
  const int64_t first = c / kLanes % kSteps * kEach;
  if (first >= kTokens) return;
  for (int64_t i = first; i < first + kEach; ++i) {
    __builtin_prefetch(row_of<X>(f.x, t + kTokens + kWidth - 1 + i, c));
  }
}

// One output of n <= kLanes channels, of any width.
template <typename X, typename Y>
void any_output(const Fir& f, int64_t t, int64_t c, int64_t n) {
  F32 y = load_part(f.bias + c, n);
  for (int64_t k = 0; k < f.width; ++k) {
    y = fma(load_part(f.weight + k * f.tap_stride + c, n), load_part(row_of<X>(f.x, t + k, c), n), y);
  }
  store_part(static_cast<Y*>(f.y) + t * f.y_stride + c, f.silu ? silu(y) : y, n);
}

template <typename X, typename Y, int kWidth>
void fir_of_width(const Fir& f) {
  int64_t t = 0;
  const int64_t whole = f.channels / kLanes * kLanes;
  for (; t + kTokens <= f.tokens; t += kTokens) {
    const bool more = t + 2 * kTokens <= f.tokens;
    for (int64_t c = 0; c < whole; c += kLanes) {
      if (more) ask_for_next<X, kWidth>(f, t, c);
      outputs<X, Y, kWidth, kTokens>(f, t, c);
    }
  }
  for (; t < f.tokens; ++t) {
    for (int64_t c = 0; c < whole; c += kLanes) outputs<X, Y, kWidth, 1>(f, t, c);
  }
  if (whole == f.channels) return;
  for (t = 0; t < f.tokens; ++t) any_output<X, Y>(f, t, whole, f.channels - whole);
}

template <typename X, typename Y>
void fir(const Fir& f) {
  switch (f.width) {
    case 2: return fir_of_width<X, Y, 2>(f);
    case 3: return fir_of_width<X, Y, 3>(f);
    case 4: return fir_of_width<X, Y, 4>(f);
  }
  for (int64_t t = 0; t < f.tokens; ++t) {
    for (int64_t c = 0; c < f.channels; c += kLanes) {
      any_output<X, Y>(f, t, c, f.channels - c < kLanes ? f.channels - c : kLanes);
    }
  }
}

// ---- backward

N3_LANE_FN F32 silu_slope(F32 v) {
  const F32 s = sigmoid(v);
  return s * fma(v, 1.f - s, splat(1.f));
}

template <typename T, int kWidth, int kCount>
N3_LANE_FN void slopes(const Slope& f, int64_t t, int64_t c) {
  F32 x[kCount + kWidth - 1], d[kCount];
#pragma GCC unroll 8
  for (int i = 0; i < kCount + kWidth - 1; ++i) x[i] = load(row_of<T>(f.x, t + i, c));
  if (f.silu) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) d[i] = load(f.bias + c);
#pragma GCC unroll 8
    for (int k = 0; k < kWidth; ++k) {
      const F32 w = load(f.weight + k * f.tap_stride + c);
#pragma GCC unroll 8
      for (int i = 0; i < kCount; ++i) d[i] = fma(w, x[i + k], d[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) d[i] = silu_slope(d[i]) * load(row_of<T>(f.grad_y, t + i, c));
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) d[i] = load(row_of<T>(f.grad_y, t + i, c));
  }
#pragma GCC unroll 8
  for (int i = 0; i < kCount; ++i) store(f.dpre[t + i] + c, d[i]);
#pragma GCC unroll 8
  for (int k = 0; k <= kWidth; ++k) {
    float* sum = f.dweight + k * f.tap_stride + c;
    F32 s = load(sum);
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) s = k < kWidth ? fma(d[i], x[i + (k < kWidth ? k : 0)], s) : s + d[i];
    store(sum, s);
  }
}

template <typename T>
void any_slope(const Slope& f, int64_t t, int64_t c, int64_t n) {
  F32 d = load_part(row_of<T>(f.grad_y, t, c), n);
  if (f.silu) {
    F32 pre = load_part(f.bias + c, n);
    for (int64_t k = 0; k < f.width; ++k) {
      pre = fma(load_part(f.weight + k * f.tap_stride + c, n), load_part(row_of<T>(f.x, t + k, c), n), pre);
    }
    d = silu_slope(pre) * d;
  }
  store_part(f.dpre[t] + c, d, n);
  for (int64_t k = 0; k <= f.width; ++k) {
    float* sum = f.dweight + k * f.tap_stride + c;
    const F32 s = load_part(sum, n);
    store_part(sum, k < f.width ? fma(d, load_part(row_of<T>(f.x, t + k, c), n), s) : s + d, n);
  }
}

template <typename T, int kWidth>
void slope_of_width(const Slope& f) {
  int64_t t = 0;
  const int64_t whole = f.channels / kLanes * kLanes;
  for (; t + kTokens <= f.tokens; t += kTokens) {
    for (int64_t c = 0; c < whole; c += kLanes) slopes<T, kWidth, kTokens>(f, t, c);
  }
  for (; t < f.tokens; ++t) {
    for (int64_t c = 0; c < whole; c += kLanes) slopes<T, kWidth, 1>(f, t, c);
  }
  if (whole == f.channels) return;
  for (t = 0; t < f.tokens; ++t) any_slope<T>(f, t, whole, f.channels - whole);
}

template <typename T>
void slope(const Slope& f) {
  switch (f.width) {
    case 2: return slope_of_width<T, 2>(f);
    case 3: return slope_of_width<T, 3>(f);
    case 4: return slope_of_width<T, 4>(f);
  }
  for (int64_t t = 0; t < f.tokens; ++t) {
    for (int64_t c = 0; c < f.channels; c += kLanes) {
      any_slope<T>(f, t, c, f.channels - c < kLanes ? f.channels - c : kLanes);
    }
  }
}

template <typename T>
void to_float(const void* from, float* to, int64_t n) {
  const T* p = static_cast<const T*>(from);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(p + i));
  if (i < n) store_part(to + i, load_part(p + i, n - i), n - i);
}

// ---- between states and rows: bits are moved, not numbers, so that a NaN arrives as it was

N3_LANE_FN U32 load_bits(const uint32_t* p) {
  U32 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
N3_LANE_FN U32 load_bits(const uint16_t* p) { return load_words(p); }
N3_LANE_FN void store_bits(uint32_t* p, U32 v) { std::memcpy(p, &v, sizeof v); }
N3_LANE_FN void store_bits(uint16_t* p, U32 v) { store_words(p, v); }

// Lanes of a, or of b at `from` lanes further on: element I of the result is element kIndex(I) of a followed by b.
template <typename Index, size_t... I>
N3_LANE_FN U32 pick(U32 a, U32 b, Index, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, Index::of(int(I))...);
}

constexpr auto kEvery = std::make_index_sequence<kLanes>();

// Row R of kLanes channels with N inputs each, which lie one behind the other in vectors v: its element j is element
// N j + R of them. Vectors are taken in one by one; a lane keeps what it has where its element is not in vector V.
template <int N, int R, int V>
struct FromVector {
  static constexpr int of(int lane) {
    const int at = N * lane + R;
    return at / kLanes == V ? kLanes + at % kLanes : lane;
  }
};

template <int N, int R, int V = 0>
N3_LANE_FN U32 row_from(const U32* v, U32 row = U32{}) {
  if constexpr (V == N) {
    return row;
  } else {
    return row_from<N, R, V + 1>(v, pick(row, v[V], FromVector<N, R, V>{}, kEvery));
  }
}

// The other way: vector V of kLanes channels with N inputs each, from rows.
template <int N, int V, int R>
struct FromRow {
  static constexpr int of(int lane) {
    const int at = V * kLanes + lane;
    return at % N == R ? kLanes + at / N : lane;
  }
};

template <int N, int V, int R = 0>
N3_LANE_FN U32 vector_from(const U32* rows, U32 v = U32{}) {
  if constexpr (R == N) {
    return v;
  } else {
    return vector_from<N, V, R + 1>(rows, pick(v, rows[R], FromRow<N, V, R>{}, kEvery));
  }
}

// kLanes channels whose N inputs lie side by side, one channel behind the other.
template <typename T, int N, size_t... I>
N3_LANE_FN void split(const T* from, T* rows, int64_t row_stride, std::index_sequence<I...>) {
  const U32 v[N] = {load_bits(from + I * kLanes)...};
  (store_bits(rows + I * row_stride, row_from<N, I>(v)), ...);
}

template <typename T, int N, size_t... I>
N3_LANE_FN void join(const void* const* rows, int64_t c, T* to, std::index_sequence<I...>) {
  const U32 row[N] = {load_bits(row_of<T>(rows, I, c))...};
  (store_bits(to + I * kLanes, vector_from<N, I>(row)), ...);
}

template <typename T, int N>
int64_t split_all(const T* from, int64_t channels, T* rows, int64_t row_stride) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    split<T, N>(from + c * N, rows + c, row_stride, std::make_index_sequence<N>());
  }
  return c;
}

template <typename T, int N>
int64_t join_all(const void* const* rows, int64_t channels, T* to) {
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) join<T, N>(rows, c, to + c * N, std::make_index_sequence<N>());
  return c;
}

// Swaps bit S of row and lane numbers between rows a and b = a + S.
template <int S, size_t... I>
N3_LANE_FN void exchange(U32& a, U32& b, std::index_sequence<I...>) {
  const U32 low = __builtin_shufflevector(a, b, (I & S ? kLanes + (I ^ S) : I)...);
  b = __builtin_shufflevector(a, b, (I & S ? kLanes + I : I ^ S)...);
  a = low;
}

template <int S = 1>
N3_LANE_FN void transpose(U32* rows) {
  if constexpr (S < kLanes) {
#pragma GCC unroll 16
    for (int r = 0; r < kLanes; ++r) {
      if (!(r & S)) exchange<S>(rows[r], rows[r + S], kEvery);
    }
    transpose<2 * S>(rows);
  }
}

// kLanes channels and as many of their inputs, which lie side by side.
template <typename T>
N3_LANE_FN void gather_square(const T* from, int64_t channel_stride, T* rows, int64_t row_stride) {
  U32 v[kLanes];
#pragma GCC unroll 16
  for (int c = 0; c < kLanes; ++c) v[c] = load_bits(from + c * channel_stride);
  transpose(v);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store_bits(rows + i * row_stride, v[i]);
}

// Channels from `first` on, one by one.
template <typename T>
void gather_rest(const Columns& from, int64_t first, T* rows, int64_t row_stride) {
  for (int64_t i = 0; i < from.inputs; ++i) {
    const T* p = static_cast<const T*>(from.data) + i * from.input_stride;
    for (int64_t c = first; c < from.channels; ++c) rows[i * row_stride + c] = p[c * from.channel_stride];
  }
}

template <typename T>
void gather(const Columns& from, void* to, int64_t row_stride) {
  const T* data = static_cast<const T*>(from.data);
  T* rows = static_cast<T*>(to);
  const int64_t channels = from.channels, inputs = from.inputs;
  if (from.channel_stride == 1) {
    for (int64_t i = 0; i < inputs; ++i) {
      std::memcpy(rows + i * row_stride, data + i * from.input_stride, channels * sizeof(T));
    }
    return;
  }
  if (from.input_stride != 1) return gather_rest(from, 0, rows, row_stride);
  int64_t done = 0;
  if (from.channel_stride == inputs && inputs >= 2 && inputs <= 4) {
    done = inputs == 2   ? split_all<T, 2>(data, channels, rows, row_stride)
           : inputs == 3 ? split_all<T, 3>(data, channels, rows, row_stride)
                         : split_all<T, 4>(data, channels, rows, row_stride);
    return gather_rest(from, done, rows, row_stride);
  }
  const int64_t squares = inputs / kLanes * kLanes;
  for (; squares && done + kLanes <= channels; done += kLanes) {
    const T* p = data + done * from.channel_stride;
    for (int64_t i = 0; i < squares; i += kLanes) {
      gather_square(p + i, from.channel_stride, rows + i * row_stride + done, row_stride);
    }
    for (int64_t c = 0; c < kLanes; ++c) {
      for (int64_t i = squares; i < inputs; ++i) rows[i * row_stride + done + c] = p[c * from.channel_stride + i];
    }
  }
  gather_rest(from, done, rows, row_stride);
}

template <typename T>
void scatter(const void* const* rows, const Columns& to) {
  T* data = static_cast<T*>(to.data);
  const int64_t channels = to.channels, inputs = to.inputs;
  if (to.channel_stride == 1) {
    for (int64_t i = 0; i < inputs; ++i) std::memcpy(data + i * to.input_stride, rows[i], channels * sizeof(T));
    return;
  }
  int64_t done = 0;
  if (to.input_stride == 1 && to.channel_stride == inputs && inputs >= 2 && inputs <= 4) {
    done = inputs == 2   ? join_all<T, 2>(rows, channels, data)
           : inputs == 3 ? join_all<T, 3>(rows, channels, data)
                         : join_all<T, 4>(rows, channels, data);
  }
  for (int64_t c = done; c < channels; ++c) {
    for (int64_t i = 0; i < inputs; ++i) {
      data[c * to.channel_stride + i * to.input_stride] = *row_of<T>(rows, i, c);
    }
  }
}

constexpr Kernels kKernels = {
    {fir<float, float>, fir<Half, Half>, fir<BFloat16, BFloat16>},
    {fir<float, float>, fir<Half, float>, fir<BFloat16, float>},
    {fir<float, float>, fir<float, Half>, fir<float, BFloat16>},
    {slope<float>, slope<Half>, slope<BFloat16>},
    {to_float<float>, to_float<Half>, to_float<BFloat16>},
    {gather<uint32_t>, gather<uint16_t>},
    {scatter<uint32_t>, scatter<uint16_t>},
};

}  // namespace
}  // namespace n3::causal_conv1d
