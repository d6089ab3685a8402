// AMX: decoded weights are the left tiles, in which 32 elements of k of one row lie side by side, so only x has to be
// transposed. Weights are decoded two steps ahead of the tiles that multiply them.
#define N3_LANES 16
#include <algorithm>

#include "../common/amx_lanes.h"
#include "linear_amx.h"

namespace n3::nvfp4_linear::amx {
namespace {

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

// Steps begin .. end of a panel and of a pair of token tiles.
struct Block {
  const TableRow* values;
  const Panel& panel;
  bool decode;  // on the way; or it has been done
  int64_t begin, end, width;
  char* slots;
  int64_t count;         // of slots
  const char *x0, *x1;  // packed tiles of tokens
  int64_t low;           // from them to those of the low parts; 0: there are none
  char* acc;             // four tiles
};

template <int kRows, int kTokens>
void run_block(const Block& b) {
  using T = n3::amx::Tiles<kRows, kTokens>;
  b.begin ? T::load(b.acc) : T::zero();
  const int64_t x_row = 4 * b.width, x_step = 16 * x_row;
  const auto slot = [&](int64_t step) { return b.slots + step % b.count * kSlot; };
  const auto nothing = [](int) {};
  const auto multiply = [&](int64_t step, const auto& between) __attribute__((always_inline)) {
    const char *x0 = b.x0 + step * x_step, *x1 = b.x1 + step * x_step;
    T::multiply(slot(step), 64, x0, x1, x_row, between);
    if (b.low) T::multiply(slot(step), 64, x0 + b.low, x1 + b.low, x_row, nothing);
  };
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

// ---- what becomes of a pair of token tiles

struct ToNothing {  // but the accumulators
  void expect(int64_t, int64_t) const {}
  void put(const char*, bool, int64_t, int64_t) const {}
};

// out[token * kPanelRows + row] of a pair, times a factor.
void put_rows(const char* acc, bool two_row_tiles, int64_t tokens, float factor, float* out) {
  float* to[kPairTokens];
  for (int64_t t = 0; t < tokens; ++t) to[t] = out + t * kPanelRows;
  to_rows(acc, factor, two_row_tiles ? kPanelRows : kTileRows, tokens, to);
}

struct ToSums {
  float* out;
  void expect(int64_t, int64_t) const {}
  void put(const char* acc, bool two_row_tiles, int64_t first, int64_t tokens) const {
    put_rows(acc, two_row_tiles, tokens, 1.f, out + first * kPanelRows);
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
    put_rows(acc, two_row_tiles, tokens, o.global, sums);
    const auto* bias = static_cast<const BFloat16*>(o.bias);
    for (int64_t r = 0; r < rows; r += kLanes) {
      const int64_t n = std::min<int64_t>(kLanes, rows - r);
      const bool whole = n == kLanes;
      const F32 b = !bias ? F32{} : whole ? load(bias + r) : load_part(bias + r, n);
      for (int64_t t = 0; t < tokens; ++t) {
        F32 v = load(sums + t * kPanelRows + r);
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
  return slots_of(k, tokens) * kSlot + acc_bytes(tokens);
}

// Rows of a tile from panel.rows on hold what was there before: a row's sums come from it alone, and theirs go nowhere.
template <typename To>
void run_panel(const void* table, const Panel& panel, const Packed& x, void* scratch, char* acc, const To& to) {
  const TableRow* values = static_cast<const Table*>(table)->values;
  const int64_t steps = steps_of(panel.k), tokens = x.tokens, tile = tile_bytes(panel.k, tokens);
  const int64_t width = tile_width(tokens), low = x.parts > 1 ? tile : 0;
  const int64_t count = slots_of(panel.k, tokens), block_steps = tokens <= kPairTokens ? steps : count;
  const bool two_row_tiles = panel.rows > kTileRows;
  char* slots = static_cast<char*>(scratch);
  configure(kPanelRows, width);
  for (int64_t begin = 0; begin < steps; begin += block_steps) {
    const int64_t end = std::min(begin + block_steps, steps);
    const char* x0 = static_cast<const char*>(x.x);
    char* sums = acc;
    for (int64_t t0 = 0; t0 < tokens; t0 += kPairTokens, x0 += 2 * x.parts * tile, sums += 4 * kTile) {
      const int64_t n = std::min(kPairTokens, tokens - t0);
      if (end == steps) to.expect(t0, n);
      const char* x1 = x0 + x.parts * tile;
      const Block block{values, panel, t0 == 0, begin, end, width, slots, count, x0, x1, low, sums};
      run_block(block, two_row_tiles, n > kTileTokens);
      if (end == steps) to.put(sums, two_row_tiles, t0, n);
    }
  }
  _tile_release();
}

void accumulate(const void* table, const Panel& panel, const Packed& x, void* scratch, char* acc) {
  run_panel(table, panel, x, scratch, acc, ToNothing{});
}

// Of scratch memory, what lies behind the slots.
char* acc_of(void* scratch, int64_t k, int64_t tokens) {
  return static_cast<char*>(scratch) + slots_of(k, tokens) * kSlot;
}

void sums(const void* table, const Panel& panel, const void* x, int64_t tokens, void* scratch, float* out) {
  run_panel(table, panel, {x, tokens, 1}, scratch, acc_of(scratch, panel.k, tokens), ToSums{out});
}

void product(const void* table, const Panel& panel, const void* x, int64_t tokens, void* scratch, const Outputs& out) {
  run_panel(table, panel, {x, tokens, 1}, scratch, acc_of(scratch, panel.k, tokens), ToOutputs{out, panel.rows});
}

void pack(const void* const* rows, int64_t count, int64_t k, int64_t width, void* tile) {
  pack_tile(kNvfp4Order, rows, count, k, width, tile);
}

}  // namespace

const Kernels kKernels = {{sizeof(Table), prepare}, scratch_bytes, pack, accumulate, sums, product};

}  // namespace n3::nvfp4_linear::amx
