// The structure of the integer products, the same for every instruction set. A strip is kLanes rows of b side by side:
// a vector of dwords holds four codes of each row, and four such vectors are a block. `Arch` brings the vectors.
#pragma once
#include <algorithm>
#include <cstring>

#include "../common/numerics.h"
#include "gemm_kernels.h"

namespace n3::nvfp4_gemm {
namespace {

// 2 * e2m1. Added to the codes of b, which one side of the instructions takes unsigned: 12.
constexpr int8_t kDoubled[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
constexpr int kOffset = 12;

// The scale bytes of a row, four at a time: neighbours in either layout.
struct RowScales {
  const uint8_t* at;
  int64_t step, blocks;

  RowScales() = default;
  RowScales(const Rows& m, int64_t row)
      : at(m.scale + (m.swizzled ? scale_128x4(row, 0, m.blocks) : row * m.blocks)),
        step(m.swizzled ? 512 : 4),
        blocks(m.blocks) {}

  // Of blocks 4 i ... 4 i + 3; those beyond the last block are 0.
  uint32_t four(int64_t i) const {
    uint32_t bytes = 0;
    if (4 * i + 4 <= blocks) {
      std::memcpy(&bytes, at + i * step, 4);
    } else {
      std::memcpy(&bytes, at + i * step, blocks - 4 * i);
    }
    return bytes;
  }
};

template <typename Arch>
struct Lanes {
  using Int = typename Arch::Int;
  using Float = typename Arch::Float;
  static constexpr int kLanes = Arch::kLanes;
  static constexpr int kStrips = Arch::kStrips;
  static constexpr int kGroup = kLanes / 2;  // blocks transposed at a time: kLanes dwords of each row
  static constexpr int64_t kPanelRows = kLanes * kStrips;
  static_assert(kPanelRows <= kMaxRows && kPanelRows % 16 == 0);

  // A block of a strip: 4 vectors of codes, then the scales.
  struct alignas(64) Block {
    uint8_t codes[4][kLanes * 4];
    float scale[kLanes];
  };

  // Blocks decoded at a time, of as many strips as a register tile has: in level 2 for many tokens, which begin and end
  // their sums with each chunk, in level 1 for a few.
  static constexpr int64_t kBytes = 120 << 10, kStep = 4 * kGroup;
  static constexpr int64_t kChunk = kBytes / (Arch::kTileStrips * int64_t(sizeof(Block))) / kStep * kStep;
  static constexpr int64_t kFewTokens = 8;

  static int64_t scratch_bytes() { return Arch::kTileStrips * kChunk * sizeof(Block); }

  static void pack(const Rows& tokens, const Tokens& packed) {
    const int64_t width = tokens.rows;
    for (int64_t t = 0; t < width; ++t) {
      const int64_t row = tokens.first + t;
      const uint8_t* q = tokens.q + row * tokens.blocks * 8;
      for (int64_t b = 0; b < tokens.blocks; ++b) {
        packed.init[b * width + t] = -kOffset * Arch::expand(q + b * 8, packed.codes[b * width + t]);
      }
      const RowScales scales(tokens, row);
      for (int64_t i = 0; 4 * i < tokens.blocks; ++i) {
        const uint32_t bytes = scales.four(i);
        for (int64_t b = 4 * i; b < std::min(4 * i + 4, tokens.blocks); ++b) {
          packed.scale[b * width + t] = e4m3_to_float(uint8_t(bytes >> b % 4 * 8)) * 0.25f;
        }
      }
    }
  }

  // Decodes blocks begin ... end of the kLanes rows from `first` on; rows past the end repeat the last one.
  static void decode_strip(const Rows& b, int64_t first, int64_t begin, int64_t end, Block* out) {
    const uint8_t* q[kLanes];
    RowScales scales[kLanes];
    for (int r = 0; r < kLanes; ++r) {
      const int64_t row = std::min(b.first + first + r, b.first + b.rows - 1);
      q[r] = b.q + row * b.blocks * 8;
      scales[r] = RowScales(b, row);
    }
    for (int64_t block = begin; block < end; block += kGroup) {
      Int v[kLanes];
      if (block + kGroup <= end) {
        for (int r = 0; r < kLanes; ++r) v[r] = Arch::load_bytes(q[r] + block * 8);
      } else {
        for (int r = 0; r < kLanes; ++r) {
          alignas(64) uint8_t rest[kGroup * 8] = {};
          v[r] = Arch::load_bytes(std::memcpy(rest, q[r] + block * 8, (end - block) * 8));
        }
      }
      Arch::transpose(v);  // v[i]: dword i of every row
      for (int64_t i = 0; i < kGroup; ++i) Arch::decode(v[2 * i], v[2 * i + 1], out[block - begin + i].codes);
    }
    for (int64_t i = begin / 4; 4 * i < end; ++i) {
      alignas(64) uint32_t four[kLanes];
      for (int r = 0; r < kLanes; ++r) four[r] = scales[r].four(i);
      for (int64_t j = 0; j < 4; ++j) Arch::scales(four, int(8 * j), out[4 * i - begin + j].scale);
    }
  }

  // Adds `blocks` blocks of G strips and T tokens to out, or begins with them.
  template <int G, int T>
  static void tile(const Block* w, int64_t blocks, const Tokens& a, bool resume, float* out) {
    Float sum[G][T];
    for (int g = 0; g < G; ++g) {
      for (int t = 0; t < T; ++t) sum[g][t] = resume ? Arch::load(out + t * kPanelRows + g * kLanes) : Arch::zero();
    }
    for (int64_t b = 0; b < blocks; ++b) {
      Int codes[G][4];
      Float scale[G];
      for (int g = 0; g < G; ++g) {
        for (int i = 0; i < 4; ++i) codes[g][i] = Arch::load_bytes(w[g * kChunk + b].codes[i]);
        scale[g] = Arch::load(w[g * kChunk + b].scale);
      }
#pragma GCC unroll 6
      for (int t = 0; t < T; ++t) {
        const int64_t at = b * T + t;
        for (int g = 0; g < G; ++g) {
          const Float dots = Arch::dots(codes[g], a.codes[at], a.init[at]);
          sum[g][t] = Arch::fma(dots, Arch::scaled(scale[g], a.scale[at]), sum[g][t]);
        }
      }
    }
    for (int t = 0; t < T; ++t) {
      for (int g = 0; g < G; ++g) Arch::store(out + t * kPanelRows + g * kLanes, sum[g][t]);
    }
  }

  // Blocks begin ... end of G strips and all tokens.
  template <int G>
  static void chunk(const Rows& b, int64_t begin, int64_t end, const Block* w, const Tokens& packed, int64_t tokens,
                    float* out) {
    const Tiles tiles{tokens};
    const int64_t n = end - begin;
    const bool resume = begin > 0;
    for (int64_t i = 0; i < tiles.count(); ++i) {
      const int64_t t0 = tiles.begin(i), width = tiles.begin(i + 1) - t0, at = t0 * b.blocks + begin * width;
      const Tokens a{packed.codes + at, packed.init + at, packed.scale + at};
      float* to = out + t0 * kPanelRows;
      switch (width) {
        case 1: tile<G, 1>(w, n, a, resume, to); break;
        case 2: tile<G, 2>(w, n, a, resume, to); break;
        case 3: tile<G, 3>(w, n, a, resume, to); break;
        case 4: tile<G, 4>(w, n, a, resume, to); break;
        case 5: tile<G, 5>(w, n, a, resume, to); break;
        default: tile<G, 6>(w, n, a, resume, to);
      }
    }
  }

  static void sums(const Rows& b, const Tokens& packed, int64_t tokens, void* scratch, float* out) {
    Block* const w = static_cast<Block*>(scratch);
    const int64_t step = tokens > kFewTokens ? kChunk : kChunk / 4;
    for (int64_t row = 0; row < b.rows; row += Arch::kTileStrips * kLanes) {
      const bool one = b.rows - row <= kLanes;
      for (int64_t begin = 0; begin < b.blocks; begin += step) {
        const int64_t end = std::min(begin + step, b.blocks);
        for (int s = 0; s < (one ? 1 : Arch::kTileStrips); ++s) {
          decode_strip(b, row + s * kLanes, begin, end, w + s * kChunk);
        }
        if (one) {
          chunk<1>(b, begin, end, w, packed, tokens, out + row);
        } else {
          chunk<Arch::kTileStrips>(b, begin, end, w, packed, tokens, out + row);
        }
      }
    }
  }
};

template <typename Arch>
constexpr Kernels kernels_of() {
  using K = Lanes<Arch>;
  return {K::kPanelRows, K::scratch_bytes, K::pack, K::sums};
}

}  // namespace
}  // namespace n3::nvfp4_gemm
