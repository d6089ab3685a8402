// The products with dense weights, compiled once per instruction set by a file that defines N3_LANES.
//
// A register tile is kTileRows weight rows by up to kTileTokens tokens, both read along k. For the few tokens of a
// decoding step it reads the weights where they lie, once; for more, a block of weights that fits the L1 cache serves
// all tokens, tile after tile. Weights of 16 bits, a last tile with fewer rows and a k that is no multiple of kChains
// are first copied as floats, completed with zeros.
#pragma once
#include <algorithm>
#include <utility>

#include "../common/lanes.h"
#include "activation_lanes.h"

namespace n3::dense_linear {
namespace {

constexpr int kParts = kLanes < kChains ? kChains / kLanes : 1;       // vectors of a row's chains
constexpr int kVectorRows = kLanes > kChains ? kLanes / kChains : 1;  // rows in a vector: row v and v + kVectors
constexpr int kTileRows = kLanes == 16 ? 8 : 4;
constexpr int kVectors = kTileRows / kVectorRows;
constexpr int kTileTokens = kLanes == 16 ? 6 : 3;  // 24 accumulators of 32 registers, 12 of 16

constexpr int64_t kBlockBytes = 24 << 10;  // of weights as floats, in an L1 cache of 32 KiB or more
constexpr int64_t kBlockRows = 16;         // most rows of a block
constexpr int64_t kBlockK = 768;           // most elements of a block's rows
constexpr int64_t kLine = 64;             // bytes of a prefetch
constexpr int64_t kAheadBytes = 8 << 10;  // least distance of a prefetch; without any, 11 tokens run at half the speed
constexpr int64_t kFewTokens = 2 * kTileTokens;  // 16-bit weights are widened in registers up to here

using Quad = float __attribute__((vector_size(16)));

// ---- operands

// kChains elements of a row of x, for every row of a vector.
N3_LANE_FN void load_token(const float* p, F32 (&v)[kParts]) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) {
    v[0] = (F32)_mm512_maskz_broadcast_f32x8(0xffff, _mm256_loadu_ps(p));
    return;
  }
#endif
  for (int i = 0; i < kParts; ++i) v[i] = load(p + i * kLanes);
}

// kChains elements of a row at p and, where a vector holds two, of another at q.
template <typename W>
N3_LANE_FN void load_weights(const W* p, [[maybe_unused]] const W* q, F32 (&v)[kParts]) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16 && sizeof(W) == 4) {
    const __m512d low = _mm512_castpd256_pd512(_mm256_loadu_pd(reinterpret_cast<const double*>(p)));
    v[0] = (F32)_mm512_maskz_insertf64x4(0xff, low, _mm256_loadu_pd(reinterpret_cast<const double*>(q)), 1);
    return;
  } else if constexpr (kLanes == 16) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q));
    W both[kLanes];
    const __m256i pair = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(both), pair);
    v[0] = load(both);
    return;
  }
#endif
  for (int i = 0; i < kParts; ++i) v[i] = load(p + i * kLanes);
}

// Keeps a value that several multiply-adds take in a register: GCC would rather make it an operand in memory of each,
// and those run at three quarters of the speed.
N3_LANE_FN void in_register([[maybe_unused]] F32 (&v)[kParts]) {
#if defined(__AVX512F__)
  for (int i = 0; i < kParts; ++i) asm("" : "+v"(v[i]));
#elif defined(__AVX2__)
  for (int i = 0; i < kParts; ++i) asm("" : "+x"(v[i]));
#endif
}

// Weight rows where they lie.
template <typename W>
struct Direct {
  static constexpr int64_t kStep = 64 / sizeof(W);  // elements between two prefetches: a line

  const W* p;
  int64_t ld;

  N3_LANE_FN void at(int v, int64_t k, F32 (&w)[kParts]) const {
    const W* row = p + v * ld + k;
    load_weights(row, row + kVectors * ld, w);
  }
};

// Weight rows copied by pack(): [chunk][vector][part] of vectors.
struct Packed {
  static constexpr int64_t kStep = 16;

  const float* p;

  N3_LANE_FN void at(int v, int64_t k, F32 (&w)[kParts]) const {
    const float* from = p + k * kTileRows + v * (kLanes * kParts);
    for (int i = 0; i < kParts; ++i) w[i] = load(from + i * kLanes);
  }
};

// Copies elements begin <= k < end of `rows` rows, and zeros up to kTileRows rows and whole chunks.
template <typename W>
void pack(const W* p, int64_t ld, int64_t rows, int64_t begin, int64_t end, float* to) {
  for (int64_t k = begin; k < end; k += kChains) {
    float* chunk = to + (k - begin) * kTileRows;
    const int64_t n = std::min(kChains, end - k);
    if (rows >= kTileRows && n == kChains) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        F32 w[kParts];
        Direct<W>{p, ld}.at(v, k, w);
        for (int i = 0; i < kParts; ++i) store(chunk + (v * kParts + i) * kLanes, w[i]);
      }
      continue;
    }
    for (int64_t r = 0; r < kTileRows; ++r) {
      float* row = chunk + r % kVectors * (kLanes * kParts) + r / kVectors * kChains;
      for (int64_t i = 0; i < kChains; ++i) row[i] = r < rows && i < n ? to_float(p[r * ld + k + i]) : 0.f;
    }
  }
}

// ---- register tiles

// In every four lanes: [a b c d], where a is (a0 + a2) + (a1 + a3) of the four there.
template <size_t... kLane>
N3_LANE_FN F32 sum_fours(F32 a, F32 b, F32 c, F32 d, std::index_sequence<kLane...>) {
  constexpr auto low = [](int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * kLanes; };       // a0 b0 a1 b1
  constexpr auto ends = [](int i) { return i / 4 * 4 + i % 2 + i % 4 / 2 * kLanes; };      // a0 a1 c0 c1
#if defined(__clang__)
  const auto pairs = [&](F32 x, F32 y) {
    return __builtin_shufflevector(x, y, low(kLane)...) + __builtin_shufflevector(x, y, low(kLane) + 2 ...);
  };
  const F32 ab = pairs(a, b), cd = pairs(c, d);
  return __builtin_shufflevector(ab, cd, ends(kLane)...) + __builtin_shufflevector(ab, cd, ends(kLane) + 2 ...);
#else
  const auto pairs = [&](F32 x, F32 y) __attribute__((always_inline)) {
    return __builtin_shuffle(x, y, I32{low(kLane)...}) + __builtin_shuffle(x, y, I32{low(kLane) + 2 ...});
  };
  const F32 ab = pairs(a, b), cd = pairs(c, d);  // [a0+a2 b0+b2 a1+a3 b1+b3]
  return __builtin_shuffle(ab, cd, I32{ends(kLane)...}) + __builtin_shuffle(ab, cd, I32{ends(kLane) + 2 ...});
#endif
}

N3_LANE_FN Quad quad_of(const F32 (&v)[kParts], int i) {
  Quad q;
  std::memcpy(&q, reinterpret_cast<const char*>(&v) + 16 * i, 16);
  return q;
}

template <int T>
struct Tile {
  F32 sum[kVectors][T][kParts];

  N3_LANE_FN void zero() {
    for (int v = 0; v < kVectors; ++v) {
      for (int t = 0; t < T; ++t) {
        for (int i = 0; i < kParts; ++i) sum[v][t][i] = F32{};
      }
    }
  }

  N3_LANE_FN void load(const float* p) {
    for (int v = 0; v < kVectors; ++v) {
      for (int t = 0; t < T; ++t) {
        for (int i = 0; i < kParts; ++i) sum[v][t][i] = n3::load(p + ((v * T + t) * kParts + i) * kLanes);
      }
    }
  }

  N3_LANE_FN void store(float* p) const {
    for (int v = 0; v < kVectors; ++v) {
      for (int t = 0; t < T; ++t) {
        for (int i = 0; i < kParts; ++i) n3::store(p + ((v * T + t) * kParts + i) * kLanes, sum[v][t][i]);
      }
    }
  }

  // k elements of w times x[t] + offset.
  template <typename W>
  N3_LANE_FN void add_chunk(const W& w, const float* const (&x)[T], int64_t k) {
    F32 xk[T][kParts];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) load_token(x[t] + k, xk[t]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      F32 wk[kParts];
      w.at(v, k, wk);
      if (T > 1 && T < kTileTokens) in_register(wk);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        for (int i = 0; i < kParts; ++i) sum[v][t][i] = fma(wk[i], xk[t][i], sum[v][t][i]);
      }
    }
  }

  // The sums of the chains.
  N3_LANE_FN void finish(float* out, int64_t ld) const {
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      F32 fours[kParts];
      for (int i = 0; i < kParts; ++i) {
        constexpr auto lanes = std::make_index_sequence<kLanes>();
        fours[i] = sum_fours(sum[0][t][i], sum[1][t][i], sum[2][t][i], sum[3][t][i], lanes);
      }
      for (int i = 0; i < kVectorRows; ++i) {
        const Quad rows = quad_of(fours, 2 * i) + quad_of(fours, 2 * i + 1);
        std::memcpy(out + t * ld + i * kVectors, &rows, 16);
      }
    }
  }
};

// Memory to ask for while a tile is at work: at every step `lines` lines, so far apart.
struct Ahead {
  const char* p;
  int64_t lines, apart, step_bytes;
};

// What the tiles of one call share: elements begin <= k < end of the rows, sums kept in `acc` between blocks of k.
struct Block {
  int64_t begin, end;
  bool first, last;
};

// P: the lines of `ahead`.
template <int T, int P, typename W>
N3_LANE_FN void run_tile(const W& w, const float* const* tokens, const Block& b, Ahead ahead, float* acc, float* out,
                         int64_t ld_out) {
  const float* x[T];
  for (int t = 0; t < T; ++t) x[t] = tokens[t] + b.begin;
  Tile<T> tile;
  if (b.first) {
    tile.zero();
  } else {
    tile.load(acc);
  }
  const int64_t n = b.end - b.begin;
  int64_t k = 0;
  for (; k + W::kStep <= n; k += W::kStep) {
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) __builtin_prefetch(ahead.p + i * ahead.apart, 0, 2);  // level 2: 7 % quicker than 1
    ahead.p += ahead.step_bytes;
#pragma GCC unroll 4
    for (int64_t i = 0; i < W::kStep; i += kChains) tile.add_chunk(w, x, k + i);
  }
  for (; k < n; k += kChains) tile.add_chunk(w, x, k);
  if (b.last) {
    tile.finish(out, ld_out);
  } else {
    tile.store(acc);
  }
}

// Tokens in tiles of nearly equal width: 4 are 2 + 2, not 3 + 1.
struct TokenTiles {
  int64_t tokens;
  int64_t count() const { return (tokens + kTileTokens - 1) / kTileTokens; }
  int64_t begin(int64_t i) const { return tokens * i / count(); }
};

template <int P, typename W>
void run_width(int64_t width, const W& w, const float* const* x, const Block& b, const Ahead& ahead, float* acc,
               float* out, int64_t ld_out) {
  switch (width) {
    case 1: return run_tile<1, P>(w, x, b, ahead, acc, out, ld_out);
    case 2: return run_tile<2, P>(w, x, b, ahead, acc, out, ld_out);
    case 3: return run_tile<3, P>(w, x, b, ahead, acc, out, ld_out);
#if N3_LANES == 16
    case 4: return run_tile<4, P>(w, x, b, ahead, acc, out, ld_out);
    case 5: return run_tile<5, P>(w, x, b, ahead, acc, out, ld_out);
    default: return run_tile<6, P>(w, x, b, ahead, acc, out, ld_out);
#endif
  }
}

// A tile of rows with token tile `i`.
template <typename W>
void run_tokens(const TokenTiles& tiles, int64_t i, const W& w, const float* const* x, const Block& b,
                const Ahead& ahead, float* acc, float* out, int64_t ld_out) {
  const int64_t t0 = tiles.begin(i), width = tiles.begin(i + 1) - t0;
  const float* const* xi = x + t0;
  float* to = out + t0 * ld_out;
  switch (ahead.lines) {
    case 1: return run_width<1>(width, w, xi, b, ahead, acc, to, ld_out);
    case 2: return run_width<2>(width, w, xi, b, ahead, acc, to, ld_out);
#if N3_LANES == 16
    case 4: return run_width<4>(width, w, xi, b, ahead, acc, to, ld_out);
#endif
    default: return run_width<kTileRows>(width, w, xi, b, ahead, acc, to, ld_out);
  }
}

// ---- panels

// Blocks of at most kBlockK elements, nearly equal, for more tokens than a tile has.
struct Blocking {
  Blocking(int64_t k, int64_t tokens) {
    const int64_t padded = whole(k, kChains);
    count = tokens <= kTileTokens ? 1 : std::max<int64_t>(1, (padded + kBlockK - 1) / kBlockK);
    length = std::max<int64_t>(whole((padded + count - 1) / count, 32), 32);
    const int64_t fit = kBlockBytes / (length * 4) / kTileRows * kTileRows;
    rows = tokens <= kTileTokens ? kTileRows : std::clamp<int64_t>(fit, kTileRows, kBlockRows);
  }

  int64_t count, length, rows;
};

// Rows from those at work to those asked for, where k has one block.
int64_t ahead_rows(int64_t rows, int64_t row_bytes) {
  return std::max(rows, kAheadBytes / std::max<int64_t>(row_bytes, 1) / kTileRows * kTileRows);
}

int64_t scratch_floats(int64_t k, int64_t tokens) {
  const Blocking blocking(k, tokens);
  return blocking.rows * (blocking.length + tokens * kChains);
}

// `bytes` of memory to be asked for by so many tiles, an equal share each.
class Shares {
 public:
  Shares(const void* p, int64_t bytes, int64_t tiles)
      : p_(static_cast<const char*>(p)), bytes_((bytes + tiles - 1) / tiles) {}

  // The share of the next tile, of so many steps: pieces side by side where a step takes nearly whole lines of them,
  // as of rows, else line after line.
  Ahead take(int64_t steps) {
    steps = std::max<int64_t>(steps, 1);
    int64_t lines = 1;  // at a step
    while (lines < kTileRows && lines * steps * kLine < bytes_) lines *= 2;
    const bool pieces = lines * steps * kLine * 7 <= bytes_ * 8;
    const int64_t piece = pieces ? bytes_ / lines : bytes_;
    const Ahead ahead{p_, lines, pieces ? piece : kLine, (piece + steps - 1) / steps};
    p_ += bytes_;
    return ahead;
  }

 private:
  const char* p_;
  int64_t bytes_;
};

template <typename W>
void sums(const Panel& panel, const float* const* x, int64_t tokens, float* scratch, float* out) {
  const Blocking blocking(panel.k, tokens);
  const TokenTiles tiles{tokens};
  const int64_t ld = panel.k, ld_out = whole(panel.rows, kRowTile), padded = whole(panel.k, kChains);
  const W* const w = static_cast<const W*>(panel.w);
  float *const packed = scratch, *const acc = scratch + blocking.rows * blocking.length;
  const int64_t distance = ahead_rows(blocking.rows, ld * int64_t(sizeof(W)));
  const bool copy = panel.k % kChains != 0 || (sizeof(W) == 2 && tokens > kFewTokens);
  for (int64_t r0 = 0; r0 < panel.rows; r0 += blocking.rows) {
    const int64_t rows = std::min(blocking.rows, panel.rows - r0);
    const int64_t row_tiles = (rows + kTileRows - 1) / kTileRows;
    Shares next(w + (r0 + distance) * ld, rows * ld * int64_t(sizeof(W)), blocking.count * tiles.count() * row_tiles);
    for (int64_t begin = 0; begin < std::max<int64_t>(padded, 1); begin += blocking.length) {
      const int64_t end = std::min(begin + blocking.length, padded), length = end - begin;
      const Block block{begin, end, begin == 0, end == padded};
      if (copy || rows % kTileRows) {
        for (int64_t r = 0; r < rows; r += kTileRows) {
          pack(w + (r0 + r) * ld, ld, rows - r, begin, std::min(end, panel.k), packed + r * length);
        }
      }
      for (int64_t i = 0; i < tiles.count(); ++i) {
        for (int64_t r = 0; r < rows; r += kTileRows) {
          float* sum = acc + (tiles.begin(i) * blocking.rows + r * (tiles.begin(i + 1) - tiles.begin(i))) * kChains;
          float* to = out + r0 + r;
          const bool copied = copy || rows - r < kTileRows;
          const Ahead ahead = next.take(length / (copied ? Packed::kStep : Direct<W>::kStep));
          if (copied) {
            run_tokens(tiles, i, Packed{packed + r * length}, x, block, ahead, sum, to, ld_out);
          } else {
            const Direct<W> direct{w + (r0 + r) * ld + begin, ld};
            run_tokens(tiles, i, direct, x, block, ahead, sum, to, ld_out);
          }
        }
      }
    }
  }
}

// ---- rows

template <Activation kActivation>
void activate_row(const float* h, const float* value, int64_t n, float* to) {
  constexpr bool kGated = is_gated(kActivation);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const F32 a = activation_of<kActivation>(load(h + i));
    store(to + i, kGated ? a * load(value + i) : a);
  }
  if (i == n) return;
  const F32 a = activation_of<kActivation>(load_part(h + i, n - i));
  store_part(to + i, kGated ? a * load_part(value + i, n - i) : a, n - i);
}

void activate(Activation activation, const float* h, const float* value, int64_t n, float* to) {
  switch (activation) {
    case kNone: return activate_row<kNone>(h, value, n, to);
    case kRelu2: return activate_row<kRelu2>(h, value, n, to);
    case kSilu: return activate_row<kSilu>(h, value, n, to);
    case kGelu: return activate_row<kGelu>(h, value, n, to);
  }
}

template <typename T>
void widen(const void* from, int64_t n, float* to) {
  const T* p = static_cast<const T*>(from);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(p + i));
  for (; i < n; ++i) to[i] = to_float(p[i]);
  std::fill(to + n, to + whole(n, kChains), 0.f);
}

template <typename T>
void narrow(const float* from, int64_t n, void* to) {
  T* p = static_cast<T*>(to);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(p + i, load(from + i));
  for (; i < n; ++i) p[i] = from_float<T>(from[i]);
}

void add(float weight, const float* row, int64_t n, float* sum) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(sum + i, load(sum + i) + splat(weight) * load(row + i));
  for (; i < n; ++i) sum[i] += weight * row[i];
}

constexpr Kernels kKernels = {
    scratch_floats,
    {sums<float>, sums<Half>, sums<BFloat16>},
    activate,
    {widen<float>, widen<Half>, widen<BFloat16>},
    {narrow<float>, narrow<Half>, narrow<BFloat16>},
    add,
};

}  // namespace
}  // namespace n3::dense_linear
