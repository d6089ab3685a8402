// The ways through a tensor, compiled once per instruction set by a file that defines N3_LANES. Lanes are blocks that
// follow each other in a row where rows lie side by side in memory, and rows where columns do. A 16x16 tile is 16
// vectors in the first case, in each of them one row of as many tiles as there are lanes; in the second its rows are
// 16 lanes.
#pragma once
#include <algorithm>

#include "quantize_lanes.h"

namespace n3::nvfp4_quantize {
namespace {

// ---- what is done with the blocks in the lanes, once they are read

template <typename T>
struct Steps {
  const Encoding& e;
  Random random{e.seed};

  // `stride` is that of the blocks' numbers.
  Quantized all(Blocks& x, const Globals& g, int64_t block, int64_t stride) {
    if (e.signs) rotate<T>(x, e.signs);
    const I32 amax = block_amax(x);
    if (!e.form.four_over_six) return encode(x, plain_scale(amax, g), g, amax, block, stride);
    const Candidates c = candidates(amax, g);
    const Scale scale = better(c, error_of(x, c.six, g, e.form.mse), error_of(x, c.four, g, e.form.mse));
    return encode(x, scale, g, amax, block, stride);
  }

  Quantized encode(const Blocks& x, const Scale& scale, const Globals& g, I32 amax, int64_t block, int64_t stride) {
    const F32 factor = encode_factor(scale, g);
    if (!e.seed) return finish(encode_nearest(x, factor), scale, amax);
    random.set(block, stride);
    return finish(encode_stochastic(x, factor, random), scale, amax);
  }
};

// ---- rows

// Blocks in the order of rows and k, L at a time.
template <typename T>
class Reader {
 public:
  // `flat`: what is asked of a row is the same for all, and rows without a gap may pass for one.
  Reader(const Matrices& m, bool flat, int64_t block) : m_(m), ks_(m.k / 16) {
    const bool dense = m.row_stride == m.k && (m.batches == 1 || m.batch_stride == m.rows * m.k);
    if (flat && dense) ks_ *= m.rows * m.batches, m_.rows = m_.batches = 1;
    row_ = block / ks_, in_row_ = block % ks_;
    start_ = start(row_);
  }

  int64_t row() const { return row_; }
  bool together(int64_t n) const { return n >= L && in_row_ + L <= ks_; }  // the next n, in one row

  // The next L blocks, which are together.
  N3_LANE_FN void read(Blocks& x) {
    const T* p = start_ + in_row_ * 16;
    load_blocks<T>([&](int b) { return p + 16 * b; }, x);
    in_row_ += L;
    if (in_row_ == ks_) next_row();
  }

  // The next n blocks wherever they are, and the rows they are in; the last of them also for the lanes behind.
  void read(Blocks& x, int64_t n, int64_t (&rows)[L]) {
    const T* at[L];
    for (int i = 0; i < L; ++i) {
      if (i < n) {
        at[i] = start_ + in_row_ * 16, rows[i] = row_;
        if (++in_row_ == ks_ && i + 1 < L) next_row();
      } else {
        at[i] = at[i - 1], rows[i] = rows[i - 1];
      }
    }
    if (in_row_ == ks_) next_row();
    load_blocks<T>([&](int b) { return at[b]; }, x);
  }

 private:
  const T* start(int64_t row) const {
    return static_cast<const T*>(m_.data) + row / m_.rows * m_.batch_stride + row % m_.rows * m_.row_stride;
  }
  void next_row() { in_row_ = 0, start_ = start(++row_); }

  Matrices m_;
  int64_t ks_, row_, in_row_;
  const T* start_;
};

template <typename T>
void encode(const Matrices& m, const Encoding& e, int64_t begin, int64_t end) {
  Reader<T> in(m, !e.form.per_row, begin);
  Steps<T> steps{e};
  Globals g(e.globals[0]);
  for (int64_t b = begin; b < end; b += L) {
    const int64_t n = end - b;
    Blocks x;
    if (in.together(n)) {
      if (e.form.per_row) g = Globals(e.globals[in.row()]);
      in.read(x);
    } else {
      int64_t rows[L];
      in.read(x, n, rows);
      const Global* of[L];
      for (int i = 0; i < L; ++i) of[i] = e.globals + rows[i];
      if (e.form.per_row) g = Globals(of);
    }
    const Quantized out = steps.all(x, g, b, 1);
    if (n >= L) {
      store(out, e.q + 8 * b, e.scale + b);
    } else {
      uint8_t q[8 * L], scale[L];
      store(out, q, scale);
      std::memcpy(e.q + 8 * b, q, 8 * n);
      std::memcpy(e.scale + b, scale, n);
    }
  }
}

// ---- tiles

N3_LANE_FN void add_tree(F32* sums, int n) {
  for (int half = n / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
}

template <typename T>
void encode_square(const Matrices& m, const Encoding& e, const Strip& strip) {
  const T* tile = static_cast<const T*>(m.data) + strip.batch * m.batch_stride + strip.row * m.row_stride;
  const int64_t first = (strip.batch * m.rows + strip.row) * (m.k / 16), end = strip.block + strip.blocks;
  const Globals g(e.globals[0]);
  Steps<T> steps{e};
  for (int64_t b = strip.block; b < end; b += L) {
    const int64_t n = std::min<int64_t>(L, end - b);
    Blocks rows[16];
    I32 amax{};
    for (int r = 0; r < 16; ++r) {
      const T* p = tile + r * m.row_stride + b * 16;
      load_blocks<T>([&](int i) { return p + 16 * std::min<int64_t>(i, n - 1); }, rows[r]);
      if (e.signs) rotate<T>(rows[r], e.signs);
      amax = larger(amax, block_amax(rows[r]));
    }
    Scale scale = plain_scale(amax, g);
    if (e.form.four_over_six) {
      const Candidates c = candidates(amax, g);
      F32 six[16], four[16];
      for (int r = 0; r < 16; ++r) six[r] = error_of(rows[r], c.six, g, e.form.mse);
      for (int r = 0; r < 16; ++r) four[r] = error_of(rows[r], c.four, g, e.form.mse);
      add_tree(six, 16), add_tree(four, 16);
      scale = better(c, six[0], four[0]);
    }
    for (int r = 0; r < 16; ++r) {
      const int64_t block = first + r * (m.k / 16) + b;
      uint8_t q[8 * L], bytes[L];
      store(steps.encode(rows[r], scale, g, amax, block, 1), q, bytes);
      std::memcpy(e.q + 8 * block, q, 8 * n);
      std::memcpy(e.scale + block, bytes, n);
    }
  }
}

// ---- columns

constexpr int64_t kColumnBlocks = 8;  // of a row at a time: what is written of its codes is one cache line

template <int S, size_t... I>
N3_LANE_FN I32 swapped(I32 v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (I ^ S)...);
}

// combine() over the lanes of 16 rows, in every lane: those of rows i and i + 8 first, then i + 4, i + 2, i + 1.
template <typename V, typename Combine>
N3_LANE_FN V over_rows(V* parts, const Combine& combine) {
  constexpr auto lanes = std::make_index_sequence<L>();
  for (int half = 16 / L / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) parts[i] = combine(parts[i], parts[i + half]);
  }
  V v = parts[0];
  if constexpr (L > 8) v = combine(v, (V)swapped<8>((I32)v, lanes));
  if constexpr (L > 4) v = combine(v, (V)swapped<4>((I32)v, lanes));
  v = combine(v, (V)swapped<2>((I32)v, lanes));
  return combine(v, (V)swapped<1>((I32)v, lanes));
}

// n lanes, blocks number block, block + ks, ...
N3_LANE_FN void scatter(const Quantized& out, const Encoding& e, int64_t block, int64_t ks, int64_t n) {
  uint8_t q[8 * L], scale[L];
  store(out, q, scale);
  for (int64_t i = 0; i < n; ++i) {
    std::memcpy(e.q + 8 * (block + i * ks), q + 8 * i, 8);
    e.scale[block + i * ks] = scale[i];
  }
}

// 16 rows from p on, blocks number block, block + ks, ...
template <typename T>
void encode_column_square(const T* p, const Matrices& m, Steps<T>& steps, const Globals& g, int64_t block) {
  constexpr int kParts = 16 / L;
  const Encoding& e = steps.e;
  const int64_t ks = m.k / 16;
  Blocks x[kParts];
  I32 tops[kParts];
  for (int i = 0; i < kParts; ++i) {
    load_columns(p + i * L, m.k_stride, L, x[i]);
    if (e.signs) rotate<T>(x[i], e.signs);
    tops[i] = block_amax(x[i]);
  }
  const I32 amax = over_rows(tops, [](I32 a, I32 b) { return larger(a, b); });
  Scale scale = plain_scale(amax, g);
  if (e.form.four_over_six) {
    const Candidates c = candidates(amax, g);
    F32 six[kParts], four[kParts];
    for (int i = 0; i < kParts; ++i) six[i] = error_of(x[i], c.six, g, e.form.mse);
    for (int i = 0; i < kParts; ++i) four[i] = error_of(x[i], c.four, g, e.form.mse);
    const auto add = [](F32 a, F32 b) { return a + b; };
    scale = better(c, over_rows(six, add), over_rows(four, add));
  }
  for (int i = 0; i < kParts; ++i) {
    const int64_t first = block + i * L * ks;
    scatter(steps.encode(x[i], scale, g, amax, first, ks), e, first, ks, L);
  }
}

template <typename T>
void encode_columns(const Matrices& m, const Encoding& e, const Strip& strip, bool square) {
  const T* data = static_cast<const T*>(m.data) + strip.batch * m.batch_stride + strip.row;
  const int64_t ks = m.k / 16, row = strip.batch * m.rows + strip.row, end = strip.block + strip.blocks;
  Steps<T> steps{e};
  for (int64_t from = strip.block; from < end; from += kColumnBlocks) {
    const int64_t to = std::min(end, from + kColumnBlocks);
    for (int64_t r = 0; r < strip.rows; r += square ? 16 : L) {
      const int64_t n = std::min<int64_t>(L, strip.rows - r);
      Globals g(e.globals[0]);
      if (e.form.per_row) {
        const Global* of[L];
        for (int i = 0; i < L; ++i) of[i] = e.globals + row + r + std::min<int64_t>(i, n - 1);
        g = Globals(of);
      }
      for (int64_t b = from; b < to; ++b) {
        const T* p = data + b * 16 * m.k_stride + r;
        const int64_t block = (row + r) * ks + b;
        if (square) {
          encode_column_square(p, m, steps, g, block);
        } else {
          Blocks x;
          load_columns(p, m.k_stride, n, x);
          scatter(steps.all(x, g, block, ks), e, block, ks, n);
        }
      }
    }
  }
}

// ---- maxima

N3_LANE_FN I32 finite_amax(const Blocks& x, I32 top) {
#pragma GCC unroll 16
  for (int k = 0; k < 16; ++k) {
    const I32 m = magnitude(x[k]);
    top = larger(m < kInfinity ? m : I32{}, top);
  }
  return top;
}

N3_LANE_FN uint32_t largest(I32 top) {
  int32_t result = 0;
  for (int i = 0; i < L; ++i) result = std::max(result, top[i]);
  return uint32_t(result);
}

template <typename T>
uint32_t rotated_amax(const Matrices& m, const float* signs, int64_t begin, int64_t end) {
  Reader<T> in(m, true, begin);
  I32 top{};
  for (int64_t b = begin; b < end; b += L) {
    Blocks x;
    int64_t rows[L];
    in.together(end - b) ? in.read(x) : in.read(x, end - b, rows);
    rotate<T>(x, signs);
    top = finite_amax(x, top);
  }
  return largest(top);
}

template <typename T>
void column_amax(const Matrices& m, const float* signs, const Strip& strip, uint32_t* out) {
  const T* data = static_cast<const T*>(m.data) + strip.batch * m.batch_stride + strip.row;
  std::fill_n(out, strip.rows, 0u);
  const int64_t end = strip.block + strip.blocks;
  for (int64_t from = strip.block; from < end; from += kColumnBlocks) {
    const int64_t to = std::min(end, from + kColumnBlocks);
    for (int64_t r = 0; r < strip.rows; r += L) {
      const int64_t n = std::min<int64_t>(L, strip.rows - r);
      I32 top{};
      std::memcpy(&top, out + r, 4 * n);
      for (int64_t b = from; b < to; ++b) {
        Blocks x;
        load_columns(data + b * 16 * m.k_stride + r, m.k_stride, n, x);
        if (signs) rotate<T>(x, signs);
        top = finite_amax(x, top);
      }
      std::memcpy(out + r, &top, 4 * n);
    }
  }
}

using I16 = int16_t __attribute__((vector_size(4 * L)));

// Magnitudes of 16-bit elements are compared as 16-bit integers.
template <typename T>
struct Bits {
  using Int = std::conditional_t<sizeof(T) == 4, int32_t, int16_t>;
  using Vector = std::conditional_t<sizeof(T) == 4, I32, I16>;
  static constexpr Int kMagnitude = sizeof(T) == 4 ? 0x7fffffff : 0x7fff;
  static constexpr Int kInfinite = std::is_same_v<T, float> ? kInfinity : std::is_same_v<T, Half> ? 0x7c00 : 0x7f80;

  static uint32_t to_float_bits(Int v) {
    T element;
    std::memcpy(&element, &v, sizeof v);
    return float_bits(to_float(element));
  }
};

template <typename T>
uint32_t amax(const void* x, int64_t n) {
  using B = Bits<T>;
  using Int = typename B::Int;
  using Vector = typename B::Vector;
  constexpr int64_t kElements = sizeof(Vector) / sizeof(Int), kVectors = 4;
  const Int* p = static_cast<const Int*>(x);
  Vector top[kVectors] = {};
  int64_t i = 0;
  for (; i + kVectors * kElements <= n; i += kVectors * kElements) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vector m;
      std::memcpy(&m, p + i + v * kElements, sizeof m);
      m &= B::kMagnitude;
      m = m < B::kInfinite ? m : Vector{};
      top[v] = m > top[v] ? m : top[v];
    }
  }
  Int result = 0;
  for (; i < n; ++i) {
    Int m = p[i] & B::kMagnitude;
    result = m < B::kInfinite ? std::max(m, result) : result;
  }
  for (const Vector& t : top) {
    for (int j = 0; j < kElements; ++j) result = std::max<Int>(t[j], result);
  }
  return B::to_float_bits(result);
}

#define N3_BY_ELEMENT(kernel) {kernel<float>, kernel<Half>, kernel<BFloat16>}
constexpr Kernels kKernels = {
    N3_BY_ELEMENT(amax),   N3_BY_ELEMENT(rotated_amax),  N3_BY_ELEMENT(column_amax),
    N3_BY_ELEMENT(encode), N3_BY_ELEMENT(encode_square), N3_BY_ELEMENT(encode_columns),
};
#undef N3_BY_ELEMENT

}  // namespace
}  // namespace n3::nvfp4_quantize
