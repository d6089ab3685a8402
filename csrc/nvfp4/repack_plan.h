// The blob of nvfp4_repack: NVFP4 weights in the order in which tensor cores (sm_80 and later) take them as operand a.
// Layout and bit maths, host and device, no torch.
//
// A tile is 16 rows by 64 k: 512 bytes of codes, then 64 bytes of scales. Rows of tiles lie one after the other; after
// the tiles of a row of tiles come kMarks bytes, the first 16 of which tell, a byte a row, whose scales have a NaN.
//   codes   lane 4 g + t of a warp has 16 bytes: word j is its part of operand a (rows g and g + 8; k 2t, 2t + 1,
//           2t + 8 and 2t + 9 from 16 j on), eight codes in the order of bit_of
//   scales  byte 8 g + 2 j + half is that of row g + 8 half and k 16 j ..
// What lies outside the weights is zero.
//
// A scale becomes 5 bits of exponent, biased by 21, and 3 of mantissa: bits 14 .. 7 of the float16 2^6 s. Its sign goes
// into the codes; under a zero scale codes keep their signs and lose their magnitudes; NaN is 0xff.
#pragma once
#include <cstdint>

#include "../common/numerics.h"

namespace n3::nvfp4_repack {

constexpr int kRows = 16, kDepth = 64;                     // of a tile
constexpr int kCodes = 512, kScales = 64, kTile = kCodes + kScales;
constexpr int kMarks = 64;                                 // 16 would do; this keeps tiles at multiples of 64
constexpr int kThreads = 256;                              // of the kernels, a block for every row of tiles

N3_HD int64_t row_tiles(int64_t n) { return (n + kRows - 1) / kRows; }
N3_HD int64_t depth_tiles(int64_t k) { return (k + kDepth - 1) / kDepth; }
N3_HD int64_t row_bytes(int64_t k) { return depth_tiles(k) * kTile + kMarks; }  // of a row of tiles

// ---- eight codes in a word

N3_HD uint32_t rotl(uint32_t w, int by) { return w << (by & 31) | w >> (-by & 31); }

// The bit of the word that holds bit `bit` (0 .. 2 magnitude, 3 sign) of the code in `half` of register `reg`, where
// codes_bf16 and codes_f16 look for it: it is what makes them few instructions.
N3_HD int bit_of(int reg, int half, int bit) {
  constexpr int kHome[4][4] = {{24, 25, 26, 1}, {28, 29, 30, 5}, {2, 3, 4, 11}, {6, 31, 0, 7}};  // of the lower half
  return (kHome[reg][bit] + 16 * half) % 32;
}

// The four registers of operand a as bfloat16 times 2^-126: the sign at bit 15, the magnitude at bits 8 .. 6, where 0.5
// is a subnormal. Four rotations and five three-input operations.
N3_HD void codes_bf16(uint32_t w, uint32_t (&r)[4]) {
  r[0] = rotl(w, 14) & 0x81c081c0;
  r[1] = rotl(w, 10) & 0x81c081c0;
  r[2] = rotl(w, 4) & 0x81c081c0;
  r[3] = (rotl(w, 8) & 0x81808180) | (w & 0x00400040);
}

// The same as float16 times 2^-14, the magnitude at bits 11 .. 9.
N3_HD void codes_f16(uint32_t w, uint32_t (&r)[4]) {
  r[0] = (rotl(w, 14) & 0x80008000) | (rotl(w, 17) & 0x0e000e00);
  r[1] = (rotl(w, 10) & 0x80008000) | (rotl(w, 13) & 0x0e000e00);
  r[2] = (rotl(w, 4) & 0x80008000) | (rotl(w, 7) & 0x0e000e00);
  r[3] = (rotl(w, 8) & 0x80008000) | (rotl(w, 11) & 0x0c000c00) | (rotl(w, 3) & 0x02000200);
}

// The word of codes c[reg][half].
N3_HD uint32_t pack_codes(const uint8_t (&c)[4][2]) {
  uint32_t w = 0;
  for (int reg = 0; reg < 4; ++reg) {
    for (int half = 0; half < 2; ++half) {
      for (int bit = 0; bit < 4; ++bit) w |= uint32_t(c[reg][half] >> bit & 1) << bit_of(reg, half, bit);
    }
  }
  return w;
}

N3_HD void unpack_codes(uint32_t w, uint8_t (&c)[4][2]) {
  uint32_t r[4];
  codes_bf16(w, r);
  for (int reg = 0; reg < 4; ++reg) {
    for (int half = 0; half < 2; ++half) {
      const uint32_t bits = r[reg] >> 16 * half;
      c[reg][half] = uint8_t((bits >> 6 & 7) | (bits >> 12 & 8));
    }
  }
}

// ---- scales

constexpr uint8_t kNaN = 0xff;

// The byte of an e4m3 scale; the codes of its block are to pass code_under.
N3_HD uint8_t pack_scale(uint8_t e4m3) {
  const int m = e4m3 & 0x7f;
  if (m == 0x7f) return kNaN;
  if (m == 0) return 0;
  if (m >= 8) return uint8_t(m + (14 << 3));       // from a bias of 7 to one of 21
  const int top = m >= 4 ? 2 : m >= 2 ? 1 : 0;     // subnormal: m * 2^-9
  return uint8_t((12 + top) << 3 | ((m << (3 - top)) & 7));
}

N3_HD uint8_t code_under(uint8_t code, uint8_t e4m3) {
  const uint8_t sign = (code & 8) ^ (e4m3 >> 4 & 8);
  return uint8_t(sign | ((e4m3 & 0x7f) == 0 ? 0 : code & 7));
}

// The e4m3 scale of a byte, never negative; NaN is 0x7f.
N3_HD uint8_t unpack_scale(uint8_t byte) {
  if (byte == kNaN) return 0x7f;
  if (byte == 0) return 0;
  const int e = byte >> 3;
  return e >= 15 ? uint8_t(byte - (14 << 3)) : uint8_t((8 | (byte & 7)) >> (15 - e));
}

// ---- where things lie

// Element of a row of tiles that code (reg, half) of word j of lane l of tile `tile` holds.
struct Place {
  int row;
  int64_t k;
};
N3_HD Place place_of(int64_t tile, int lane, int j, int reg, int half) {
  return {lane / 4 + reg % 2 * 8, tile * kDepth + 16 * j + reg / 2 * 8 + lane % 4 * 2 + half};
}

// Offset of the scale of row r (0 .. 15) and k 16 j .. in a tile.
N3_HD int scale_at(int row, int j) { return kCodes + row % 8 * 8 + 2 * j + row / 8; }

// ---- one row of tiles, in pieces that any number of threads can share

struct Weights {
  const uint8_t *q, *block_scale;  // [n, k / 2], [n, k / 16]
  int64_t n, k;
};

// Word `word` (0 .. 127: 4 lane + j) of a tile of the row of tiles `row_tile`.
N3_HD uint32_t packed_word(const Weights& w, int64_t row_tile, int64_t tile, int word) {
  uint8_t codes[4][2];
  for (int reg = 0; reg < 4; ++reg) {
    const Place p = place_of(tile, word / 4, word % 4, reg, 0);
    const int64_t row = row_tile * kRows + p.row;
    const bool inside = row < w.n && p.k < w.k;
    const uint8_t pair = inside ? w.q[(row * w.k + p.k) / 2] : 0;
    const uint8_t scale = inside ? w.block_scale[(row * w.k + p.k) / 16] : 0x38;
    codes[reg][0] = code_under(pair & 15, scale);
    codes[reg][1] = code_under(pair >> 4, scale);
  }
  return pack_codes(codes);
}

// Byte `byte` (0 .. 63) of the scales of a tile.
N3_HD uint8_t packed_scale(const Weights& w, int64_t row_tile, int64_t tile, int byte) {
  const int64_t row = row_tile * kRows + byte / 8 + byte % 2 * 8, block = tile * 4 + byte / 2 % 4;
  return row < w.n && block < w.k / 16 ? pack_scale(w.block_scale[row * (w.k / 16) + block]) : uint8_t(0);
}

}  // namespace n3::nvfp4_repack
