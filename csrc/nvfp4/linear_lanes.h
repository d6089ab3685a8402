// The structure of the CPU linear, the same for every instruction set: streaming for a few tokens, register tiles over
// decoded weights for more. `Arch` brings the vector, the decoding of 32 weights into kStreams vectors, and the final
// sum. The chains of one stream are independent of the other streams', so a tile runs the streams one after another
// and needs a single accumulator per output: 12 outputs in 16 registers, 24 in 32.
#pragma once
#include <algorithm>

#include "linear_kernels.h"

namespace n3::nvfp4_linear {
namespace {

template <typename Arch>
struct Lanes {
  using Vec = typename Arch::Vec;
  using Table = typename Arch::Table;
  static constexpr int kLanes = Arch::kLanes;
  static constexpr int kStreams = kChunk / kLanes;

  static constexpr int64_t kAhead = 2048;    // bytes of q; without it one token runs at 0.4 of the speed (DRAM, AVX2)
  static constexpr int64_t kFewTokens = 16;  // see tile_panel; measured with K = 2688 on Sapphire Rapids

  static int64_t chunks_of(int64_t k) { return (k + kChunk - 1) / kChunk; }

  static int64_t widest(int64_t tokens) { return (tokens + Tiles{tokens}.count() - 1) / Tiles{tokens}.count(); }

  // Rows of a register tile: the widest tile of tokens decides, the others are at most one narrower.
  static constexpr int tile_rows(int64_t widest) { return Arch::kTileOutputs / (widest > 4 ? 6 : 4); }

  // Packed x is [kStreams, chunks, width, kLanes], decoded weights are [kStreams, chunks, rows, kLanes], tile after
  // tile: a register tile reads two sequences.
  static void pack(const float* x, int64_t k, int64_t width, int64_t t, float* packed) {
    const int64_t chunks = chunks_of(k), full = k / kChunk;
    const auto put = [&](int64_t c, const float* chunk) {
      for (int s = 0; s < kStreams; ++s) {
        float* to = packed + ((s * chunks + c) * width + t) * kLanes;
        for (int i = 0; i < kLanes; ++i) to[i] = chunk[Arch::kOrder[s * kLanes + i]];
      }
    };
    for (int64_t c = 0; c < full; ++c) put(c, x + c * kChunk);
    if (full < chunks) {
      float rest[kChunk] = {};
      std::copy_n(x + full * kChunk, k - full * kChunk, rest);
      put(full, rest);
    }
  }

  // Calls body(chunk, q, scale) for chunks begin..end of one row; half a chunk at the end is completed with zeros.
  template <typename Body>
  __attribute__((always_inline)) static void for_chunks(const Panel& panel, int64_t row, int64_t begin, int64_t end,
                                                        const Body& body) {
    const uint8_t* q = panel.q + row * (panel.k / 2);
    const uint8_t* scale = panel.scale + row * (panel.k / 16);
    const int64_t full = std::min(end, panel.k / kChunk);
    int64_t c = begin;
    // A line of codes at a time, asking for memory kAhead bytes on: the hardware's prefetcher stops at page ends.
    for (; c + 4 <= full; c += 4) {
      __builtin_prefetch(q + c * 16 + kAhead);
      __builtin_prefetch(scale + c * 2 + kAhead / 8);
#pragma GCC unroll 4
      for (int64_t i = 0; i < 4; ++i) body(c + i, q + (c + i) * 16, scale + (c + i) * 2);
    }
    for (; c < full; ++c) body(c, q + c * 16, scale + c * 2);
    if (c < end) {
      uint8_t rest[16] = {}, rest_scale[2] = {scale[c * 2], 0};
      std::copy_n(q + c * 16, 8, rest);
      body(c, rest, rest_scale);
    }
  }

  // One row, T tokens, accumulators in registers.
  template <int T>
  static void stream_row(const Table& table, const Panel& panel, int64_t row, const float* x, float* acc) {
    const int64_t stream = chunks_of(panel.k) * T * kLanes;
    Vec sum[T][kStreams];
    for (int t = 0; t < T; ++t) {
      for (int s = 0; s < kStreams; ++s) sum[t][s] = Arch::zero();
    }
    const auto add = [&](int64_t c, const uint8_t* q, const uint8_t* scale) __attribute__((always_inline)) {
      Vec w[kStreams];
      Arch::decode(table, q, scale, w);
      for (int t = 0; t < T; ++t) {
        for (int s = 0; s < kStreams; ++s) {
          sum[t][s] = Arch::fma(w[s], Arch::load(x + s * stream + (c * T + t) * kLanes), sum[t][s]);
        }
      }
    };
    for_chunks(panel, row, 0, chunks_of(panel.k), add);
    for (int t = 0; t < T; ++t) {
      for (int s = 0; s < kStreams; ++s) Arch::store(acc + (t * kStreams + s) * kLanes, sum[t][s]);
    }
  }

  template <int T>
  static void stream_panel(const Table& table, const Panel& panel, const float* x, float* acc, float* out) {
    for (int64_t r = 0; r < panel.rows; ++r) stream_row<T>(table, panel, r, x, acc + r * T * kChunk);
    reduce<T>(acc, panel.rows, out, panel.rows);
  }

  // Decodes chunks begin..end of a panel into tiles of `height` rows; a last tile is completed with zero rows.
  static void decode_panel(const Table& table, const Panel& panel, int64_t begin, int64_t end, int64_t height,
                           float* w) {
    const int64_t stream = (end - begin) * height * kLanes, tile = stream * kStreams;
    if (panel.rows % height) std::fill_n(w + panel.rows / height * tile, tile, 0.f);
    for (int64_t r = 0; r < panel.rows; ++r) {
      float* to = w + r / height * tile + r % height * kLanes;
      const auto put = [&](int64_t c, const uint8_t* q, const uint8_t* scale) __attribute__((always_inline)) {
        Vec v[kStreams];
        Arch::decode(table, q, scale, v);
        for (int s = 0; s < kStreams; ++s) Arch::store(to + s * stream + (c - begin) * height * kLanes, v[s]);
      };
      for_chunks(panel, r, begin, end, put);
    }
  }

  // R rows x T tokens of one stream. acc [R, T, kStreams, kLanes], offset to the stream, is added to if `resume`.
  template <int R, int T>
  static void tile(const float* w, const float* x, int64_t chunks, bool resume, float* acc) {
    Vec sum[R][T];
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < T; ++t) sum[r][t] = resume ? Arch::load(acc + (r * T + t) * kChunk) : Arch::zero();
    }
#pragma GCC unroll 4
    for (int64_t c = 0; c < chunks; ++c) {
      Vec wi[R];
      for (int r = 0; r < R; ++r) wi[r] = Arch::load(w + (c * R + r) * kLanes);
      for (int t = 0; t < T; ++t) {
        const Vec xi = Arch::load(x + (c * T + t) * kLanes);
        for (int r = 0; r < R; ++r) sum[r][t] = Arch::fma(wi[r], xi, sum[r][t]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < T; ++t) Arch::store(acc + (r * T + t) * kChunk, sum[r][t]);
    }
  }

  // Chunks begin..end of k, decoded in w, of `rows` rows; x is the whole tile of tokens.
  struct Block {
    int64_t rows, chunks, begin, end;
    const float *w, *x;
    float* acc;
  };

  template <int R, int T>
  static void block_tiles(const Block& b) {
    const int64_t n = b.end - b.begin;
    // Where a panel has many rows, the next tokens come from the last-level cache: asked for a little with every tile.
    const int64_t next_floats = b.rows > R ? n * kChunk * T : 0, calls = kStreams * ((b.rows + R - 1) / R);
    const float *ahead = b.x + b.chunks * kChunk * T, *const ahead_end = ahead + next_floats;
    const int64_t step = (next_floats / calls + 15) / 16 * 16;
    for (int s = 0; s < kStreams; ++s) {
      const float* x = b.x + (s * b.chunks + b.begin) * T * kLanes;
      for (int64_t r = 0; r < b.rows; r += R) {
        for (const float* end = std::min(ahead + step, ahead_end); ahead < end; ahead += 16) {
          __builtin_prefetch(ahead, 0, 2);
        }
        tile<R, T>(b.w + (r * kStreams + s * R) * n * kLanes, x, n, b.begin > 0, b.acc + r * T * kChunk + s * kLanes);
      }
    }
  }

  // The same for any width that occurs beside `height`; then, after the last block, the sums.
  static void block_tokens(const Block& b, int64_t width, int64_t height, float* out, int64_t stride) {
    constexpr int kFew = tile_rows(6), kMany = tile_rows(4);
    const bool last = b.end == b.chunks;
    switch (width) {
      case 3: block_tiles<kMany, 3>(b); return last ? reduce<3>(b.acc, b.rows, out, stride) : void();
      case 4:
        height == kMany ? block_tiles<kMany, 4>(b) : block_tiles<kFew, 4>(b);
        return last ? reduce<4>(b.acc, b.rows, out, stride) : void();
      case 5: block_tiles<kFew, 5>(b); return last ? reduce<5>(b.acc, b.rows, out, stride) : void();
      default: block_tiles<kFew, 6>(b); return last ? reduce<6>(b.acc, b.rows, out, stride) : void();
    }
  }

  // Few tokens: decoded weights would cost more to write and read back through the level-2 cache than to use, so one
  // tile of rows and a part of k at a time stay in level 1, with the accumulators of all tokens. Many tokens: the
  // whole panel in level 2, and the accumulators of one tile of tokens.
  static void tile_panel(const Table& table, const Panel& panel, const float* x, int64_t tokens, float* scratch,
                         float* out) {
    const Tiles tiles{tokens};
    const int64_t chunks = chunks_of(panel.k);
    const bool few = tokens <= kFewTokens;
    const int64_t height = tile_rows(widest(tokens)), rows = few ? height : panel.rows;
    const int64_t blocks = few ? (chunks * height * kChunk * 4 + Arch::kBlockBytes - 1) / Arch::kBlockBytes : 1;
    float *acc = scratch, *w = scratch + acc_floats(tokens, rows);
    for (int64_t r = 0; r < panel.rows; r += rows) {
      const int64_t n = std::min(rows, panel.rows - r);
      const Panel part{panel.q + r * (panel.k / 2), panel.scale + r * (panel.k / 16), n, panel.k};
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t begin = chunks * i / blocks, end = chunks * (i + 1) / blocks;
        decode_panel(table, part, begin, end, height, w);
        for (int64_t j = 0; j < tiles.count(); ++j) {
          const int64_t t0 = tiles.begin(j);
          float* tile_acc = few ? acc + t0 * height * kChunk : acc;
          const Block block{n, chunks, begin, end, w, x + t0 * chunks * kChunk, tile_acc};
          block_tokens(block, tiles.begin(j + 1) - t0, height, out + t0 * panel.rows + r, panel.rows);
        }
      }
    }
  }

  // Chains acc [rows, T] -> out[t * stride + row].
  template <int T>
  static void reduce(const float* acc, int64_t rows, float* out, int64_t stride) {
    float sums[Arch::kReduce * T];
    for (int64_t r = 0; r < rows; r += Arch::kReduce) {
      for (int t = 0; t < T; ++t) Arch::reduce(acc + (r * T + t * Arch::kReduce) * kChunk, sums + t * Arch::kReduce);
      const int n = int(std::min<int64_t>(Arch::kReduce, rows - r));
      for (int t = 0; t < T; ++t) {
        for (int i = 0; i < n; ++i) out[t * stride + r + i] = sums[i * T + t];
      }
    }
  }

  // A few tokens need no decoded copy: the chains of one tile fit the registers, and decoding twice is cheap.
  static bool streams(int64_t tokens) { return tokens <= 8 && widest(tokens) <= Arch::kStreamTokens; }

  static int64_t panel_rows(int64_t k, int64_t tokens) {
    if (streams(tokens) || tokens <= kFewTokens) return 24;
    const int64_t rows = Arch::kPanelBytes / (chunks_of(k) * kChunk * 4);
    return std::clamp<int64_t>(rows / 12 * 12, 12, 48);
  }

  // The accumulators of the rows, completed to a tile and to whole steps of reduce().
  static int64_t acc_floats(int64_t tokens, int64_t rows) {
    return (rows + 16) * std::max(kMaxTile, std::min(tokens, kFewTokens)) * kChunk;
  }

  static int64_t scratch_bytes(int64_t k, int64_t tokens) {
    const int64_t rows = panel_rows(k, tokens);
    const int64_t decoded = streams(tokens) ? 0 : (rows + 8) * chunks_of(k) * kChunk;
    return (acc_floats(tokens, rows) + decoded) * 4;
  }

  static void sums(const void* table_bytes, const Panel& panel, const float* x, int64_t tokens, void* scratch,
                   float* out) {
    const Table& table = *static_cast<const Table*>(table_bytes);
    float* acc = static_cast<float*>(scratch);
    if (!streams(tokens)) return tile_panel(table, panel, x, tokens, acc, out);
    const Tiles tiles{tokens};
    for (int64_t i = 0; i < tiles.count(); ++i) {
      const int64_t t0 = tiles.begin(i), width = tiles.begin(i + 1) - t0;
      const float* xi = x + t0 * chunks_of(panel.k) * kChunk;
      float* to = out + t0 * panel.rows;
      switch (width) {
        case 1: stream_panel<1>(table, panel, xi, acc, to); break;
        case 2: stream_panel<2>(table, panel, xi, acc, to); break;
        case 3: stream_panel<3>(table, panel, xi, acc, to); break;
        default: stream_panel<4>(table, panel, xi, acc, to);
      }
    }
  }
};

template <typename Arch>
constexpr Kernels kernels_of() {
  using K = Lanes<Arch>;
  return {{sizeof(typename Arch::Table), Arch::prepare}, K::pack, K::panel_rows, K::scratch_bytes, K::sums};
}

}  // namespace
}  // namespace n3::nvfp4_linear
