// AMX: weights are the left tiles, in which 32 elements of k of one row lie side by side, as they do in memory.
#define N3_LANES 16
#include <algorithm>
#include <cstring>

#include "../common/amx_lanes.h"
#include "activation_lanes.h"
#include "dense_amx.h"

namespace n3::dense_linear::amx {
namespace {

constexpr int64_t kLine = 64;  // bytes of a prefetch

// Weight rows that are multiplied together. Elements of k behind the last whole step are copied, completed with zeros:
// what lies behind a row may be no number.
class Rows {
 public:
  Rows(const Panel& panel, int64_t begin)
      : count(std::min(kPanelRows, panel.rows - begin)),
        stride(panel.k * 2),
        steps(panel.k / kStep),
        p(static_cast<const char*>(panel.w) + begin * stride),
        rest(panel.k % kStep) {
    if (rest == 0) return;
    std::memset(copied, 0, count * kStep * 2);
    for (int64_t r = 0; r < count; ++r) {
      std::memcpy(copied + r * kStep * 2, p + r * stride + steps * kStep * 2, rest * 2);
    }
  }

  const int64_t count, stride, steps;  // whole ones
  const char* const p;
  const int64_t rest;
  alignas(64) char copied[kPanelRows * kStep * 2];
};

// Memory to ask for: so many lines at each of a step's pauses.
struct Ahead {
  const char* p;
  int64_t lines;
};

// A pair of packed tiles, and what lies between a tile and that of the low parts, 0 if there is none.
struct Pair {
  const char *x0, *x1;
  int64_t low, width;
  bool both;
};

template <int kRows, int kTokens>
void run_pair(const Rows& w, const Pair& pair, Ahead& ahead, char* acc) {
  using T = n3::amx::Tiles<kRows, kTokens>;
  const int64_t x_row = 4 * pair.width, x_step = kTileRows * x_row, low = pair.low, stride = w.stride;
  const int64_t lines = ahead.lines;
  const char *x0 = pair.x0, *x1 = pair.x1, *p = w.p, *next = ahead.p;
  const auto nothing = [](int) {};
  T::zero();
  for (int64_t step = 0; step < w.steps; ++step, p += 2 * kStep, x0 += x_step, x1 += x_step) {
    T::multiply(p, stride, x0, x1, x_row, [&](int) __attribute__((always_inline)) {
#pragma GCC unroll 1
      for (const char* end = next + lines * kLine; next < end; next += kLine) __builtin_prefetch(next, 0, 2);
    });
    if (low) T::multiply(p, stride, x0 + low, x1 + low, x_row, nothing);
  }
  if (w.rest) {
    T::multiply(w.copied, 2 * kStep, x0, x1, x_row, nothing);
    if (low) T::multiply(w.copied, 2 * kStep, x0 + low, x1 + low, x_row, nothing);
  }
  ahead.p = next;
  T::store(acc);
}

void run_pair(const Rows& w, const Pair& pair, Ahead& ahead, char* acc) {
  if (w.count > kTileRows) return pair.both ? run_pair<2, 2>(w, pair, ahead, acc) : run_pair<2, 1>(w, pair, ahead, acc);
  return pair.both ? run_pair<1, 2>(w, pair, ahead, acc) : run_pair<1, 1>(w, pair, ahead, acc);
}

void accumulate(const Panel& panel, const Packed& x, char* acc) {
  const int64_t width = tile_width(x.tokens), tile = tile_bytes(panel.k, x.tokens), low = x.parts > 1 ? tile : 0;
  const int64_t pairs = (x.tokens + kPairTokens - 1) / kPairTokens;
  int64_t configured = 0;
  for (int64_t r = 0; r < panel.rows; r += kPanelRows) {
    const Rows w(panel, r);
    if (w.count != configured) configure(configured = w.count, width);
    // The rows that follow are as many bytes as these, most often.
    const int64_t pauses = std::max<int64_t>(pairs * w.steps * 4, 1), lines = w.count * w.stride / kLine;
    Ahead ahead{w.p + w.count * w.stride, (lines + pauses - 1) / pauses};
    const char* at = static_cast<const char*>(x.x);
    for (int64_t t = 0; t < x.tokens; t += kPairTokens, at += 2 * x.parts * tile, acc += 4 * kTile) {
      run_pair(w, {at, at + x.parts * tile, low, width, x.tokens - t > kTileTokens}, ahead, acc);
    }
  }
  _tile_release();
}

// ---- from one product to the next

template <Activation kActivation>
void pack_activated(const Packing& p) {
  const Order& order = p.pairs == Pairs::kNvfp4 ? kNvfp4Order : kInOrder;
  const int64_t width = tile_width(p.tokens), tile = tile_bytes(p.k, p.tokens), n = tiles_of(p.tokens);
  const int64_t rows = p.rows;
  const float factor = p.factor;
  const __mmask16 columns = __mmask16((1u << width) - 1);
  for (int64_t t = 0; t < n; ++t) {
    const auto* h = reinterpret_cast<const float*>(p.h + t * 2 * kTile);
    const auto* value = is_gated(kActivation) ? reinterpret_cast<const float*>(p.value + t * 2 * kTile) : nullptr;
    // Lanes without a token hold anything, subnormal numbers too, and those are slow.
    const auto scaled = [&](const float* acc, int row) __attribute__((always_inline)) {
      return (F32)_mm512_maskz_loadu_ps(columns, acc + row * kLanes) * factor;
    };
    const auto activated = [&](int row) __attribute__((always_inline)) {
      if (row >= rows) return F32{};
      const F32 a = activation_of<kActivation>(scaled(h, row));
      return is_gated(kActivation) ? a * scaled(value, row) : a;
    };
    char* high = p.tiles + t * 2 * tile + p.step * kTileRows * width * 4;
    char* low = high + tile;
    for (int i = 0; i < kTileRows; ++i, high += width * 4, low += width * 4) {
      F32 low0, low1;
      const U32 high0 = split_words(activated(order[2 * i]), low0), high1 = split_words(activated(order[2 * i + 1]), low1);
      const U32 lows = to_words(BFloat16{}, low0) | to_words(BFloat16{}, low1) << 16;
      _mm512_mask_storeu_epi32(high, columns, (__m512i)(high0 | high1 << 16));
      _mm512_mask_storeu_epi32(low, columns, (__m512i)lows);
    }
  }
}

void pack_activated(const Packing& p) {
  switch (p.activation) {
    case kNone: return pack_activated<kNone>(p);
    case kRelu2: return pack_activated<kRelu2>(p);
    case kSilu: return pack_activated<kSilu>(p);
    case kGelu: return pack_activated<kGelu>(p);
  }
}

void pack(const void* const* rows, int64_t count, int64_t k, int64_t width, void* tile) {
  pack_tile(kInOrder, rows, count, k, width, tile);
}

}  // namespace

const Kernels kKernels = {pack, accumulate, pack_activated, to_rows};

}  // namespace n3::dense_linear::amx
