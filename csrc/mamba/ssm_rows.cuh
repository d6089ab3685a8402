// One row of a state, the N values of (slot, head, channel), in the registers of kLanes neighbouring threads: reading
// and writing it in every dtype, and one step of the recurrence. What ssm_update and mamba2_decode share, so that they
// give the same bits.
//
// Lane l holds the groups of 4 elements l, l + kLanes, ...: a warp reads whole 128-byte lines of a float32 state, and
// a draw of Philox, four words, serves one group.
#pragma once
#include <type_traits>

#include "../common/philox.h"
#include "views.cuh"

namespace n3::mamba {

struct E4m3 {
  uint8_t bits;
};

template <typename State>
constexpr bool kScaled = std::is_same_v<State, int8_t> || std::is_same_v<State, E4m3>;

N3_DEVICE float value_of(float v) { return v; }
N3_DEVICE float value_of(F16 v) { return device::widen(v); }
N3_DEVICE float value_of(BF16 v) { return device::widen(v); }
N3_DEVICE float value_of(int8_t v) { return float(v); }
N3_DEVICE float value_of(E4m3 v) { return e4m3_to_float(v.bits); }

// ---- rounding

template <typename State>
N3_DEVICE State nearest(float v);
template <>
N3_DEVICE float nearest<float>(float v) { return v; }
template <>
N3_DEVICE F16 nearest<F16>(float v) { return device::narrow<F16>(v); }
template <>
N3_DEVICE BF16 nearest<BF16>(float v) { return device::narrow<BF16>(v); }
template <>
N3_DEVICE int8_t nearest<int8_t>(float v) { return int8_t(fminf(fmaxf(rintf(v), -127.f), 127.f)); }
template <>
N3_DEVICE E4m3 nearest<E4m3>(float v) { return {e4m3_from_float(v)}; }

// The magnitude toward zero on the target's grid, one step up iff word >> 8 is below the fraction in units of 2^-24.
// What lies beyond the largest finite value: to nearest (16 bits), or that value (8 bits).
N3_DEVICE bool below(uint32_t word, float fraction) { return uniform24(word) < fraction; }

template <typename State>
N3_DEVICE State stochastic(float v, uint32_t word);
template <>
N3_DEVICE float stochastic<float>(float v, uint32_t) { return v; }
template <>
N3_DEVICE BF16 stochastic<BF16>(float v, uint32_t word) {
  const uint32_t bits = float_bits(v), magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f7f0000) return nearest<BF16>(v);
  const uint32_t up = below(word, float(bits & 0xffff) * 0x1p-16f);
  return {uint16_t((bits >> 16) + up)};
}
template <>
N3_DEVICE F16 stochastic<F16>(float v, uint32_t word) {
  const uint32_t bits = float_bits(v), magnitude = bits & 0x7fffffff;
  if (magnitude > 0x477fe000) return nearest<F16>(v);  // 65504
  uint32_t q;
  float fraction;
  if (magnitude < 0x38800000) {  // below 2^-14: steps of 2^-24
    const float steps = bits_float(magnitude) * 0x1p24f;
    q = uint32_t(steps);
    fraction = steps - float(q);
  } else {
    q = (magnitude >> 13) - (112 << 10);
    fraction = float(magnitude & 0x1fff) * 0x1p-13f;
  }
  return {uint16_t((q + below(word, fraction)) | (bits >> 16 & 0x8000))};
}
template <>
N3_DEVICE int8_t stochastic<int8_t>(float v, uint32_t word) {
  const float a = fminf(fabsf(v), 127.f), q = truncf(a);
  const float code = fminf(q + float(below(word, a - q)), 127.f);
  return int8_t(v < 0.f ? -code : code);
}
template <>
N3_DEVICE E4m3 stochastic<E4m3>(float v, uint32_t word) {
  const uint32_t sign = float_bits(v) >> 24 & 0x80;
  const float a = fminf(fabsf(v), 448.f);
  const uint32_t bits = float_bits(a);
  uint32_t q;
  float fraction;
  if (bits < 0x3c800000) {  // below 2^-6: steps of 2^-9
    const float steps = a * 512.f;
    q = uint32_t(steps);
    fraction = steps - float(q);
  } else {
    q = (bits >> 20) - 960;  // bias 127 to 7, 3 bits of mantissa
    fraction = float(bits & 0xfffff) * 0x1p-20f;
  }
  return {uint8_t(sign | (q + below(word, fraction)))};
}

struct Rounding {
  const int64_t* seed;  // (seed, offset) of stochastic rounding; null: to nearest
  int64_t stride = 1;   // between the two
};

// ---- rows

template <typename State>
N3_DEVICE void load4(const State* p, float (&v)[4]) {
  if constexpr (std::is_same_v<State, float>) {
    const float4 f = *reinterpret_cast<const float4*>(p);
    v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
  } else if constexpr (sizeof(State) == 2) {
    const uint2 u = *reinterpret_cast<const uint2*>(p);
    v[0] = value_of(State{uint16_t(u.x)}), v[1] = value_of(State{uint16_t(u.x >> 16)});
    v[2] = value_of(State{uint16_t(u.y)}), v[3] = value_of(State{uint16_t(u.y >> 16)});
  } else {
    const uint32_t u = *reinterpret_cast<const uint32_t*>(p);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (std::is_same_v<State, int8_t>) {
        v[i] = float(int8_t(u >> 8 * i));
      } else {
        v[i] = value_of(E4m3{uint8_t(u >> 8 * i)});
      }
    }
  }
}

N3_DEVICE uint32_t bits_of(F16 v) { return v.bits; }
N3_DEVICE uint32_t bits_of(BF16 v) { return v.bits; }
N3_DEVICE uint32_t bits_of(int8_t v) { return uint8_t(v); }
N3_DEVICE uint32_t bits_of(E4m3 v) { return v.bits; }

template <typename State>
N3_DEVICE void store4(State* p, const State (&v)[4]) {
  if constexpr (std::is_same_v<State, float>) {
    *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
  } else if constexpr (sizeof(State) == 2) {
    *reinterpret_cast<uint2*>(p) =
        make_uint2(bits_of(v[0]) | bits_of(v[1]) << 16, bits_of(v[2]) | bits_of(v[3]) << 16);
  } else {
    *reinterpret_cast<uint32_t*>(p) =
        bits_of(v[0]) | bits_of(v[1]) << 8 | bits_of(v[2]) << 16 | bits_of(v[3]) << 24;
  }
}

// A row is n elements, `stride` apart.
struct RowShape {
  int64_t n, stride;
};

// kVectors: they are neighbours, n is a multiple of 4 and every row begins at a multiple of 4 elements.
template <int kLanes, int kGroups, bool kVectors>
struct Row {
  static constexpr int kWidth = kLanes * kGroups * 4;  // the most elements it can hold
  static constexpr int kThreadsOfRow = kLanes;
  float h[kGroups][4];

  // First element of this thread's group g.
  static N3_DEVICE int first(int lane, int g) { return (g * kLanes + lane) * 4; }

  // `scale`: what the codes of an 8-bit state are multiplied with. Elements behind the row are 0.
  template <typename State>
  N3_DEVICE void read(const State* row, const RowShape& shape, int lane, float scale) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int at = first(lane, g);
      if constexpr (kVectors) {
        if (at < shape.n) {
          load4(row + at, h[g]);
        } else {
          h[g][0] = h[g][1] = h[g][2] = h[g][3] = 0.f;
        }
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) h[g][i] = at + i < shape.n ? value_of(row[(at + i) * shape.stride]) : 0.f;
      }
      if constexpr (kScaled<State>) {
#pragma unroll
        for (int i = 0; i < 4; ++i) h[g][i] *= scale;
      }
    }
  }

  // h = decay h + u B; B has kWidth elements, zeros behind the row, whose elements stay 0.
  N3_DEVICE void advance(float decay, float u, const float* B, const RowShape& shape, int lane) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int at = first(lane, g);
      if (at >= shape.n) continue;  // infinity times 0
      const float4 b = *reinterpret_cast<const float4*>(B + at);
      h[g][0] = fmaf(decay, h[g][0], u * b.x), h[g][1] = fmaf(decay, h[g][1], u * b.y);
      h[g][2] = fmaf(decay, h[g][2], u * b.z), h[g][3] = fmaf(decay, h[g][3], u * b.w);
    }
  }

  // The sum of h C, in every lane of the row: elements in order within a lane, then lanes pairwise, the farthest first.
  N3_DEVICE float dot(const float* C, const RowShape& shape, int lane) const {
    float sum = 0.f;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int at = first(lane, g);
      if (at >= shape.n) continue;
      const float4 c = *reinterpret_cast<const float4*>(C + at);
      const float terms[4] = {c.x, c.y, c.z, c.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (kVectors || at + i < shape.n) sum = fmaf(h[g][i], terms[i], sum);
      }
    }
#pragma unroll
    for (int far = kLanes / 2; far; far /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, far);
    return sum;
  }

  // The decode scale of an 8-bit row: amax / largest; NaN where a value is not finite. Every lane of a warp must call.
  template <typename State>
  N3_DEVICE float scale_for(const RowShape& shape, int lane) const {
    uint32_t top = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t magnitude = float_bits(h[g][i]) & 0x7fffffff;  // ordered as the floats are
        if (first(lane, g) + i < shape.n) top = max(top, magnitude);
      }
    }
#pragma unroll
    for (int far = kLanes / 2; far; far /= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, far));
    constexpr float kLargest = std::is_same_v<State, int8_t> ? 127.f : 448.f;
    return top < 0x7f800000 ? bits_float(top) / kLargest : bits_float(0x7fc00000);
  }

  // `element`: number of the row's first element in a contiguous state; `token`: after which it is stored.
  template <typename State>
  N3_DEVICE void write(State* row, const RowShape& shape, int lane, float scale, const Rounding& rounding,
                       int64_t element, int64_t token) const {
    const bool draws = rounding.seed && !std::is_same_v<State, float>;
    const uint64_t key = draws ? uint64_t(rounding.seed[0]) : 0;
    const uint64_t step = draws ? uint64_t(rounding.seed[rounding.stride]) + uint64_t(token) : 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int at = first(lane, g);
      if (at >= shape.n) continue;
      float v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        v[i] = h[g][i];
        if constexpr (kScaled<State>) v[i] = scale > 0.f ? v[i] / scale : 0.f;
      }
      State out[4];
      if (draws) {
        uint32_t words[4];
        draw(key, step, uint64_t(element + at), words);
#pragma unroll
        for (int i = 0; i < 4; ++i) out[i] = stochastic<State>(v[i], words[i]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) out[i] = nearest<State>(v[i]);
      }
      if constexpr (kVectors) {
        store4(row + at, out);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (at + i < shape.n) row[(at + i) * shape.stride] = out[i];
        }
      }
    }
  }

  // The words of elements e .. e + 3: word e & 3 of the draw e >> 2.
  static N3_DEVICE void draw(uint64_t key, uint64_t step, uint64_t e, uint32_t (&words)[4]) {
    const Philox4 a = philox4x32(key, e >> 2, step);
    if constexpr (kVectors) {  // e is a multiple of 4
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = a.word[i];
    } else {
      const Philox4 b = philox4x32(key, (e >> 2) + 1, step);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] = a.word[i];  // moved down by e & 3
        if ((e & 3) == 1) words[i] = i < 3 ? a.word[(i + 1) & 3] : b.word[0];
        if ((e & 3) == 2) words[i] = i < 2 ? a.word[(i + 2) & 3] : b.word[i & 1];
        if ((e & 3) == 3) words[i] = i < 1 ? a.word[3] : b.word[(i + 3) & 3];
      }
    }
  }
};

}  // namespace n3::mamba
