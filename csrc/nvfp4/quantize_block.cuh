// Codes and scales of blocks of 16, which every quantising kernel shares: each operation one float32 rounding, in the
// order of quantize.h, so that the bytes are those of every other backend.
#pragma once
#include "../common/philox.h"
#include "quantize_codes.cuh"
#include "quantize_plan.h"

namespace n3::nvfp4_quantize {

struct Codes {
  uint32_t word[2];  // codes 0..7 and 8..15, the low nibble first
};

// ---- maxima, rotation

// Of magnitudes; NaN if one is.
N3_DEVICE float max_nan(float a, float b) {
#if defined(__CUDACC__)
  float top;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(top) : "f"(a), "f"(b));
  return top;
#else
  return bits_float(max(float_bits(a), float_bits(b)));
#endif
}

// As bits, kInfinity or above if one is not finite.
N3_DEVICE uint32_t magnitude_max(const float (&v)[16]) {
  float top = fabsf(v[0]);
#pragma unroll
  for (int i = 1; i < 16; ++i) top = max_nan(top, fabsf(v[i]));
  return float_bits(top);
}

N3_DEVICE uint32_t finite_max(const float (&v)[16]) {
  uint32_t top = magnitude_max(v);
  if (top < kInfinity) return top;
  top = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const uint32_t magnitude = float_bits(v[i]) & 0x7fffffff;
    top = max(top, magnitude < kInfinity ? magnitude : 0u);
  }
  return top;
}

template <typename T>
N3_DEVICE void round_to(float (&v)[16]) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int i = 0; i < 16; i += 2) {
      const uint32_t both = device::pack<T>(v[i], v[i + 1]);
      v[i] = device::widen(T{uint16_t(both)});
      v[i + 1] = device::widen(T{uint16_t(both >> 16)});
    }
  }
}

// (v * signs) @ H16 / 4, rounded to T.
template <typename T>
N3_DEVICE void rotate(float (&v)[16], const float* signs) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 s = reinterpret_cast<const float4*>(signs)[i];
    v[4 * i] *= s.x, v[4 * i + 1] *= s.y, v[4 * i + 2] *= s.z, v[4 * i + 3] *= s.w;
  }
#pragma unroll
  for (int stride = 1; stride < 16; stride *= 2) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i & stride) continue;
      const float a = v[i], b = v[i + stride];
      v[i] = a + b, v[i + stride] = a - b;
    }
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) v[i] *= 0.25f;
  round_to<T>(v);
}

// ---- scales

struct Global {
  float s_enc, inv, out, amax;
};

// From a given decode scale, or from the maximum of the tensor or row.
N3_DEVICE Global global_scale(float from, bool given, bool four_over_six) {
  const float normal = four_over_six ? 1536.f : 2688.f;
  float s_enc = fmaxf(fminf((given ? 1.f : normal) / from, FLT_MAX), -FLT_MAX);
  if (from == 0.f || s_enc == 0.f) s_enc = 1.f;
  const float inv = 1.f / s_enc;
  return {s_enc, inv, given ? from : inv, given ? from * normal : from};
}

N3_DEVICE float encode_factor(uint8_t scale, float inv) {
  return fminf(1.f / (scale_value(scale) * inv), FLT_MAX);
}

// Sum, k = 0..15 in order, of |d| or d * d with d = ((code * scale) * amax) / 1536 - x. Signs cancel out of |d|.
template <bool kFast>
N3_DEVICE float error_of(const float (&x)[16], uint8_t byte, const Global& g, bool mse) {
  const float scale = scale_value(byte), factor = encode_factor(byte, g.inv);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float t = nearest_value(x[i] * factor) * scale * g.amax;
    const float d = fabsf(over_1536<kFast>(t) - fabsf(x[i]));
    sum += mse ? d * d : d;
  }
  return sum;
}

// The scale that puts the largest magnitude, given as bits, at 6.
N3_DEVICE uint8_t plain_scale(uint32_t top, const Global& g) {
  return scale_byte(bits_float(top) * (g.s_enc * (1.f / 6.f)));
}

// ---- blocks

// The teams of threads whose blocks share a scale replace maxima and error sums by those of the team; a lone block has
// nobody to ask.
struct Alone {
  template <int kBlocks>
  N3_DEVICE void max(uint32_t (&)[kBlocks]) const {}
  template <int kBlocks>
  N3_DEVICE void sum(float (&)[kBlocks]) const {}
};

struct Quantised {
  Codes codes;
  uint8_t scale;
};

// The words of stochastic rounding of the block whose first element has this number.
N3_DEVICE Codes stochastic_codes(const float (&x)[16], float factor, const int64_t* seed, int64_t first) {
  Codes codes{};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Philox4 random = philox4x32(uint64_t(seed[0]), uint64_t(first >> 2) + i, uint64_t(seed[1]));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      codes.word[i / 2] |= stochastic_code(x[4 * i + j] * factor, random.word[j]) << (16 * (i % 2) + 4 * j);
    }
  }
  return codes;
}

// Codes under the stored scale, of which nothing survives if it is 0.
N3_DEVICE Codes codes_of(const float (&x)[16], uint8_t byte, float inv, const int64_t* seed, int64_t first) {
  const float factor = encode_factor(byte, inv);
  if (!(byte & 0x7f)) return {};
  if (seed) return stochastic_codes(x, factor, seed, first);
  float v[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) v[i] = x[i] * factor;
  return {{nearest_codes(v), nearest_codes(v + 8)}};
}

// kBlocks blocks of this thread, each under its own global scale. A block with a NaN or an infinity, or the tile it is
// in, decodes to NaN: scale 0x7f, codes 0. `seed` is that of `args`, or null where the kernel has no use for one.
template <int kBlocks, typename Team>
N3_DEVICE void quantize_blocks(const float (&x)[kBlocks][16], const Global (&g)[kBlocks],
                               const int64_t (&first)[kBlocks], const Args& args, const int64_t* seed, Team team,
                               Quantised (&out)[kBlocks]) {
  uint32_t top[kBlocks];
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) top[j] = magnitude_max(x[j]);
  team.max(top);
  if (args.four_over_six) {
    float least[kBlocks] = {};
#pragma unroll 1  // one after the other: half the code, and registers for one
    for (int four = 0; four < 2; ++four) {
      uint8_t scale[kBlocks];
      float error[kBlocks];
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        const float base = bits_float(top[j]) / 6.f * g[j].s_enc;
        scale[j] = scale_byte(four ? base * 1.5f : base);
        error[j] = fast_over_1536(g[j].amax) ? error_of<true>(x[j], scale[j], g[j], args.mse)
                                             : error_of<false>(x[j], scale[j], g[j], args.mse);
      }
      team.sum(error);
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        if (four && !(error[j] < least[j])) continue;
        least[j] = error[j], out[j].scale = scale[j];
      }
    }
  } else {
#pragma unroll
    for (int j = 0; j < kBlocks; ++j) out[j].scale = plain_scale(top[j], g[j]);
  }
#pragma unroll
  for (int j = 0; j < kBlocks; ++j) {
    out[j].codes = codes_of(x[j], out[j].scale, g[j].inv, seed, first[j]);
    if (top[j] >= kInfinity) out[j] = {{}, 0x7f};
  }
}

// ---- memory

// 16 elements in a row.
template <typename T>
N3_DEVICE void load_block(const T* p, bool vectors, float (&v)[16]) {
  if (vectors) return device::load16(p, v);
#pragma unroll
  for (int i = 0; i < 16; ++i) v[i] = device::widen(p[i]);
}

N3_DEVICE int64_t scale_at(const Args& args, int64_t row, int64_t c) {
  return args.swizzled ? scale_128x4(row, c, args.ks) : row * args.ks + c;
}

N3_DEVICE void store(const Args& args, int64_t row, int64_t c, const Quantised& block) {
  reinterpret_cast<uint2*>(args.q)[row * args.ks + c] = make_uint2(block.codes.word[0], block.codes.word[1]);
  args.block_scale[scale_at(args, row, c)] = block.scale;
}

// A place of the scale matrix that has no block is zero if it is padding; if it is outside, nothing is written.
N3_DEVICE void pad(const Args& args, int64_t row, int64_t c) {
  if (!args.swizzled) return;
  if (row >= nvfp4_swizzle::padded_rows(args.rows) || c >= nvfp4_swizzle::padded_cols(args.ks)) return;
  args.block_scale[scale_at(args, row, c)] = 0;
}

// The global scale of the whole tensor, in every thread, from the maxima of the launch before. Not to be called where
// there is one per row.
N3_DEVICE Global tensor_scale(const Args& args) {
  float from;
  if (args.given) {
    from = *args.given;
  } else {
    from = bits_float(device::block_max<kThreads>(int(threadIdx.x) < args.partials ? args.partial[threadIdx.x] : 0u));
  }
  const Global g = global_scale(from, args.given != nullptr, args.four_over_six);
  if (blockIdx.x == 0 && threadIdx.x == 0) *args.global_out = g.out;
  return g;
}

}  // namespace n3::nvfp4_quantize
