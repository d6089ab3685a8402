// AMX: decoded weights are the left tiles, in which 32 elements of k of one row lie side by side, so only x has to be
// transposed. Weights are decoded two steps ahead of the tiles that multiply them.
#define N3_LANES 16
#include <algorithm>

#include "../common/lanes.h"
#include "linear_amx.h"

namespace n3::nvfp4_linear::amx {
namespace {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTile = 1024;       // bytes of a whole tile
constexpr int64_t kSlot = 2 * kTile;  // decoded weights of a panel and a step
constexpr int64_t kRing = 4;          // slots, where weights are used once: 8 KiB, in a level-1 cache
constexpr int64_t kMostSlots = 96;    // where they are used again: 192 KiB, in a level-2 cache
constexpr int64_t kAhead = 2;         // steps from decoding to use

struct alignas(64) Table {
  uint16_t values[256][16];  // [scale byte][code]: bfloat16
};

void prepare(const Values& values, void* out) {
  Table& table = *static_cast<Table*>(out);
  for (int s = 0; s < 256; ++s) {
    for (int code = 0; code < 16; ++code) table.values[s][code] = uint16_t(float_bits(values[s][code]) >> 16);
  }
}

// The compiler does not know what memory the tile instructions read and write.
N3_LANE_FN void tiles_see_memory(const void* p = nullptr) { asm volatile("" ::"r"(p) : "memory"); }

// Tiles 0 to 3 are accumulators, number r + 2 * t of weights 4 + r and tokens 6 + t.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

void configure(int64_t width) {
  Config config;
  for (int i = 0; i < 8; ++i) {
    config.rows[i] = kTileRows;
    config.row_bytes[i] = uint16_t(i == 4 || i == 5 ? 64 : 4 * width);
  }
  tiles_see_memory(&config);
  _tile_loadconfig(&config);
}

// ---- decoding

using TableRow = uint16_t[16];

// 16 weights of a block; word 4 * i + j is element 4 * j + i.
N3_LANE_FN __m256i decode(const TableRow* values, const uint8_t* q, uint8_t scale) {
  long long codes;
  __builtin_memcpy(&codes, q, 8);
  const __m256i index = _mm256_srlv_epi64(_mm256_set1_epi64x(codes), _mm256_setr_epi64x(0, 4, 8, 12));
  return _mm256_permutexvar_epi16(index, _mm256_load_si256(reinterpret_cast<const __m256i*>(values[scale])));
}

N3_LANE_FN void decode_row(const TableRow* values, const uint8_t* q, const uint8_t* scale, char* to) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(to), decode(values, q, scale[0]));
  _mm256_store_si256(reinterpret_cast<__m256i*>(to + 32), decode(values, q + 8, scale[1]));
}

// Decodes one step of a panel into its slot; half a step at the end is completed with zeros.
N3_LANE_FN void decode_step(const TableRow* values, const Panel& panel, int64_t step, char* to) {
  const int64_t q_row = panel.k / 2, scale_row = panel.k / 16;
  const uint8_t *q = panel.q + step * 16, *scale = panel.scale + step * 2;
  const bool whole = step * kStep + kStep <= panel.k;
  for (int64_t r = 0; r < panel.rows; ++r, q += q_row, scale += scale_row, to += 64) {
    if (whole) {
      decode_row(values, q, scale, to);
    } else {
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), decode(values, q, scale[0]));
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + 32), _mm256_setzero_si256());
    }
  }
}

// The same for 8 rows of a whole step; and a part of the panel that lies behind this one is asked for.
N3_LANE_FN void decode_eight(const TableRow* values, const Panel& panel, int64_t step, int64_t begin, char* to) {
  const int64_t q_row = panel.k / 2, scale_row = panel.k / 16;
  const uint8_t *q = panel.q + begin * q_row + step * 16, *scale = panel.scale + begin * scale_row + step * 2;
  const uint8_t* ahead = panel.q + panel.rows * (q_row + step * 16) + begin * 16;
  __builtin_prefetch(ahead, 0, 2);
  __builtin_prefetch(ahead + 64, 0, 2);
  if (begin == 0) __builtin_prefetch(panel.scale + panel.rows * (scale_row + step * 2), 0, 2);
  const int64_t q_3_rows = 3 * q_row, scale_3_rows = 3 * scale_row;
#pragma GCC unroll 1
  for (const char* end = to + 512; to < end; to += 256, q += 4 * q_row, scale += 4 * scale_row) {
    decode_row(values, q, scale, to);
    decode_row(values, q + q_row, scale + scale_row, to + 64);
    decode_row(values, q + 2 * q_row, scale + 2 * scale_row, to + 128);
    decode_row(values, q + q_3_rows, scale + scale_3_rows, to + 192);
  }
}

// ---- tiles

// The products of 1 or 2 tiles of weights and of tokens.
template <int kRows, int kTokens>
struct Tiles {
  static constexpr bool kBoth = kRows > 1 && kTokens > 1;

  static void zero() {
    _tile_zero(0);
    if constexpr (kRows > 1) _tile_zero(1);
    if constexpr (kTokens > 1) _tile_zero(2);
    if constexpr (kBoth) _tile_zero(3);
  }

  static void load(const char* acc) {
    tiles_see_memory();
    _tile_loadd(0, acc, 64);
    if constexpr (kRows > 1) _tile_loadd(1, acc + kTile, 64);
    if constexpr (kTokens > 1) _tile_loadd(2, acc + 2 * kTile, 64);
    if constexpr (kBoth) _tile_loadd(3, acc + 3 * kTile, 64);
  }

  static void store(char* acc) {
    _tile_stored(0, acc, 64);
    if constexpr (kRows > 1) _tile_stored(1, acc + kTile, 64);
    if constexpr (kTokens > 1) _tile_stored(2, acc + 2 * kTile, 64);
    if constexpr (kBoth) _tile_stored(3, acc + 3 * kTile, 64);
    tiles_see_memory();
  }

  // Calls between(0 .. 2 * kRows) on the way: spread out, so that neither loads nor products wait for each other.
  template <typename Between>
  N3_LANE_FN static void multiply(const char* w, const char* x0, const char* x1, int64_t x_row,
                                  const Between& between) {
    tiles_see_memory();
    _tile_loadd(6, x0, x_row);
    between(0);
    _tile_loadd(4, w, 64);
    between(1);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kRows > 1) {
      _tile_loadd(5, w + kTile, 64);
      between(2);
    }
    if constexpr (kTokens > 1) _tile_loadd(7, x1, x_row);
    if constexpr (kRows > 1) {
      between(3);
      _tile_dpbf16ps(1, 5, 6);
    }
    if constexpr (kTokens > 1) _tile_dpbf16ps(2, 4, 7);
    if constexpr (kBoth) _tile_dpbf16ps(3, 5, 7);
  }
};

// Steps begin .. end of a panel and of a pair of token tiles.
struct Block {
  const TableRow* values;
  const Panel& panel;
  bool decode;  // on the way; or it has been done
  int64_t begin, end, width;
  char* slots;
  int64_t count;         // of slots
  const char *x0, *x1;  // packed tiles of tokens
  char* acc;             // four tiles
};

template <int kRows, int kTokens>
void run_block(const Block& b) {
  using T = Tiles<kRows, kTokens>;
  b.begin ? T::load(b.acc) : T::zero();
  const int64_t x_row = 4 * b.width, x_step = 16 * x_row;
  const auto slot = [&](int64_t step) { return b.slots + step % b.count * kSlot; };
  const auto multiply = [&](int64_t step, const auto& between) __attribute__((always_inline)) {
    T::multiply(slot(step), b.x0 + step * x_step, b.x1 + step * x_step, x_row, between);
  };
  const auto nothing = [](int) {};
  int64_t step = b.begin;
  if (b.decode) {
    const TableRow* values = b.values;
    const Panel panel = b.panel;
    const auto decode_all = [&](int64_t i) { decode_step(values, panel, i, slot(i)); };
    const int64_t first = std::min(b.begin + kAhead, b.end);
    for (int64_t i = step; i < first; ++i) decode_all(i);
    const int64_t whole = panel.rows < kRows * kTileRows ? 0 : std::min(b.end, panel.k / kStep);
    for (; step + kAhead < whole; ++step) {
      char* to = slot(step + kAhead);
      multiply(step, [&](int i) __attribute__((always_inline)) {
        decode_eight(values, panel, step + kAhead, 8 * i, to + 512 * i);
      });
    }
    for (; step + kAhead < b.end; ++step) {
      decode_all(step + kAhead);
      multiply(step, nothing);
    }
  }
  for (; step < b.end; ++step) multiply(step, nothing);
  T::store(b.acc);
}

void run_block(const Block& b, bool two_row_tiles, bool two_token_tiles) {
  if (two_row_tiles) return two_token_tiles ? run_block<2, 2>(b) : run_block<2, 1>(b);
  return two_token_tiles ? run_block<1, 2>(b) : run_block<1, 1>(b);
}

// ---- transposition of 16 x 16 words of 32 bits

// With masks of ones: GCC 12 warns of what the plain intrinsics leave undefined.
#define N3_UNPACK(half, bits, a, b) _mm512_maskz_unpack##half##_epi##bits(-1, a, b)
#define N3_QUARTERS(a, b, which) _mm512_maskz_shuffle_i32x4(-1, a, b, which)

N3_LANE_FN void transpose(__m512i (&v)[16]) {
  __m512i a[16];
  for (int i = 0; i < 16; i += 4) {  // 4 x 4 words in every quarter
    const __m512i low0 = N3_UNPACK(lo, 32, v[i], v[i + 1]), low1 = N3_UNPACK(lo, 32, v[i + 2], v[i + 3]);
    const __m512i high0 = N3_UNPACK(hi, 32, v[i], v[i + 1]), high1 = N3_UNPACK(hi, 32, v[i + 2], v[i + 3]);
    a[i] = N3_UNPACK(lo, 64, low0, low1), a[i + 1] = N3_UNPACK(hi, 64, low0, low1);
    a[i + 2] = N3_UNPACK(lo, 64, high0, high1), a[i + 3] = N3_UNPACK(hi, 64, high0, high1);
  }
  for (int i = 0; i < 4; ++i) {  // 4 x 4 quarters
    const __m512i even0 = N3_QUARTERS(a[i], a[i + 4], 0x88), even1 = N3_QUARTERS(a[i + 8], a[i + 12], 0x88);
    const __m512i odd0 = N3_QUARTERS(a[i], a[i + 4], 0xdd), odd1 = N3_QUARTERS(a[i + 8], a[i + 12], 0xdd);
    v[i] = N3_QUARTERS(even0, even1, 0x88), v[i + 8] = N3_QUARTERS(even0, even1, 0xdd);
    v[i + 4] = N3_QUARTERS(odd0, odd1, 0x88), v[i + 12] = N3_QUARTERS(odd0, odd1, 0xdd);
  }
}

#undef N3_UNPACK
#undef N3_QUARTERS

// ---- what becomes of a pair of token tiles

// out[token * kPanelRows + row] from the four accumulators [row, token].
void transpose_pair(const char* acc, bool two_row_tiles, int64_t tokens, float* out) {
  for (int64_t t0 = 0; t0 < tokens; t0 += kTileTokens) {
    for (int64_t r = 0; r <= two_row_tiles; ++r) {
      __m512i v[16];
      for (int i = 0; i < 16; ++i) v[i] = _mm512_load_si512(acc + (t0 / 8 + r) * kTile + 64 * i);
      transpose(v);
      const int64_t n = std::min(kTileTokens, tokens - t0);
      for (int64_t t = 0; t < n; ++t) _mm512_store_si512(out + (t0 + t) * kPanelRows + r * kTileRows, v[t]);
    }
  }
}

struct ToSums {
  float* out;
  void expect(int64_t, int64_t) const {}
  void put(const char* acc, bool two_row_tiles, int64_t first, int64_t tokens) const {
    transpose_pair(acc, two_row_tiles, tokens, out + first * kPanelRows);
  }
};

struct ToOutputs {
  const Outputs& o;
  int64_t rows;

  BFloat16* row_of(int64_t token) const { return static_cast<BFloat16*>(o.y) + token * o.stride; }

  // Lines of y that will be written: on their way into the cache while the tiles multiply.
  void expect(int64_t first, int64_t tokens) const {
    for (int64_t t = first; t < first + tokens; ++t) {
      __builtin_prefetch(row_of(t), 1);
      __builtin_prefetch(row_of(t) + rows - 1, 1);
    }
  }

  void put(const char* acc, bool two_row_tiles, int64_t first, int64_t tokens) const {
    alignas(64) float sums[kPairTokens * kPanelRows];
    transpose_pair(acc, two_row_tiles, tokens, sums);
    const auto* bias = static_cast<const BFloat16*>(o.bias);
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, rows - r);
      const bool whole = n == kLanes;
      const F32 b = !bias ? F32{} : whole ? load(bias + r) : load_part(bias + r, n);
      for (int64_t t = 0; t < tokens; ++t) {
        F32 v = load(sums + t * kPanelRows + r) * o.global;
        if (bias) v += b;
        if (o.relu2) v = v < 0.f ? F32{} : v * v;
        BFloat16* to = row_of(first + t) + r;
        whole ? store(to, v) : store_part(to, v, n);
      }
    }
  }
};

// ---- a panel

// Slots for decoded weights: a ring for one pair of token tiles; for more, all steps of a block, and blocks of equal
// size, for each of which the accumulators are loaded and stored.
int64_t slots_of(int64_t k, int64_t tokens) {
  if (tokens <= kPairTokens) return kRing;
  const int64_t steps = steps_of(k), blocks = (steps + kMostSlots - 1) / kMostSlots;
  return (steps + blocks - 1) / blocks;
}

int64_t scratch_bytes(int64_t k, int64_t tokens) {
  return slots_of(k, tokens) * kSlot + (tokens + kPairTokens - 1) / kPairTokens * 4 * kTile;
}

// Rows of a tile from panel.rows on hold what was there before: a row's sums come from it alone, and theirs go nowhere.
template <typename To>
void run_panel(const void* table, const Panel& panel, const void* x, int64_t tokens, void* scratch, const To& to) {
  const TableRow* values = static_cast<const Table*>(table)->values;
  const int64_t steps = steps_of(panel.k), x_tile = tile_bytes(panel.k, tokens), count = slots_of(panel.k, tokens);
  const int64_t width = tile_width(tokens), block_steps = tokens <= kPairTokens ? steps : count;
  const bool two_row_tiles = panel.rows > kTileRows;
  char *slots = static_cast<char*>(scratch), *acc = slots + count * kSlot;
  configure(width);
  for (int64_t begin = 0; begin < steps; begin += block_steps) {
    const int64_t end = std::min(begin + block_steps, steps);
    const char* x0 = static_cast<const char*>(x);
    char* sums = acc;
    for (int64_t t0 = 0; t0 < tokens; t0 += kPairTokens, x0 += 2 * x_tile, sums += 4 * kTile) {
      const int64_t n = std::min(kPairTokens, tokens - t0);
      if (end == steps) to.expect(t0, n);
      const Block block{values, panel, t0 == 0, begin, end, width, slots, count, x0, x0 + x_tile, sums};
      run_block(block, two_row_tiles, n > kTileTokens);
      if (end == steps) to.put(sums, two_row_tiles, t0, n);
    }
  }
  _tile_release();
}

void sums(const void* table, const Panel& panel, const void* x, int64_t tokens, void* scratch, float* out) {
  run_panel(table, panel, x, tokens, scratch, ToSums{out});
}

void product(const void* table, const Panel& panel, const void* x, int64_t tokens, void* scratch, const Outputs& out) {
  run_panel(table, panel, x, tokens, scratch, ToOutputs{out, panel.rows});
}

void pack(const void* const* rows, int64_t count, int64_t k, int64_t width, void* tile) {
  // Pairs as decode() makes them: word 16 * b + 4 * i + j is element 16 * b + 4 * j + i.
  alignas(64) uint16_t order[32];
  for (int w = 0; w < 32; ++w) order[w] = uint16_t(w / 16 * 16 + w % 4 * 4 + w % 16 / 4);
  const __m512i pairs = _mm512_load_si512(order);
  const __mmask16 columns = __mmask16((1u << width) - 1);
  auto* to = static_cast<uint32_t*>(tile);
  for (int64_t begin = 0; begin < k; begin += kStep, to += 16 * width) {
    const __mmask32 elements = k - begin < kStep ? 0xffff : 0xffffffff;
    const auto load = [&](int64_t t) {
      const auto* row = static_cast<const uint16_t*>(rows[t]) + begin;
      return _mm512_permutexvar_epi16(pairs, _mm512_maskz_loadu_epi16(elements, row));
    };
    if (width == 1) {
      _mm512_storeu_si512(to, load(0));
      continue;
    }
    __m512i v[16];
    for (int t = 0; t < 16; ++t) v[t] = t < count ? load(t) : _mm512_setzero_si512();
    transpose(v);
    for (int i = 0; i < 16; ++i) _mm512_mask_storeu_epi32(to + i * width, columns, v[i]);
  }
}

}  // namespace

const Kernels kKernels = {{sizeof(Table), prepare}, scratch_bytes, pack, sums, product};

}  // namespace n3::nvfp4_linear::amx
