// What the mamba kernels take of tensors: pointers with strides, element types known at run time, slots of states.
//
// Operands that are small beside the states (x, B, C, dt, weights of any floating dtype and any strides) are read
// through a View; only what decides the speed of a kernel is a template parameter.
#pragma once
#include "../common/device.cuh"

namespace n3::mamba {

using device::BF16;
using device::F16;

// A float16 that becomes +-65504 instead of infinite: what passes between the parts of a mixer, from inputs of 16 bits.
struct Saturated {
  uint16_t bits;
};

}  // namespace n3::mamba

namespace n3::device {

N3_DEVICE float widen(mamba::Saturated v) { return widen(F16{v.bits}); }

template <>
N3_DEVICE uint32_t pack<mamba::Saturated>(float lo, float hi) {
#if defined(__CUDACC__)
  uint32_t w;
  asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(hi), "f"(lo));
  return w;
#else
  const auto clamp = [](float v) { return v > 65504.f ? 65504.f : v < -65504.f ? -65504.f : v; };  // NaN stays
  return pack<F16>(clamp(lo), clamp(hi));
#endif
}

}  // namespace n3::device

namespace n3::mamba {

enum class Type : int32_t { kFloat, kHalf, kBFloat16, kInt8, kE4m3, kBool };

// Strides count elements.
struct View {
  void* data;  // null: not given
  Type type;
  int64_t strides[4];
};

N3_DEVICE float load(const View& v, int64_t at) {
  if (v.type == Type::kFloat) return static_cast<const float*>(v.data)[at];
  if (v.type == Type::kHalf) return device::widen(static_cast<const F16*>(v.data)[at]);
  return device::widen(static_cast<const BF16*>(v.data)[at]);
}

N3_DEVICE void store(const View& v, int64_t at, float value) {
  if (v.type == Type::kFloat) {
    static_cast<float*>(v.data)[at] = value;
  } else if (v.type == Type::kHalf) {
    static_cast<F16*>(v.data)[at] = device::narrow<F16>(value);
  } else {
    static_cast<BF16*>(v.data)[at] = device::narrow<BF16>(value);
  }
}

// 8 neighbouring elements, 16-byte aligned.
N3_DEVICE void load8(const float* p, float (&v)[8]) {
  const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
template <typename T>
N3_DEVICE void load8(const T* p, float (&v)[8]) {
  const uint4 u = *reinterpret_cast<const uint4*>(p);
  const uint32_t words[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = device::widen(T{uint16_t(words[i])});
    v[2 * i + 1] = device::widen(T{uint16_t(words[i] >> 16)});
  }
}
N3_DEVICE void store8(float* p, const float (&v)[8]) {
  reinterpret_cast<float4*>(p)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(p)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
template <typename T>
N3_DEVICE void store8(T* p, const float (&v)[8]) {
  *reinterpret_cast<uint4*>(p) = make_uint4(device::pack<T>(v[0], v[1]), device::pack<T>(v[2], v[3]),
                                            device::pack<T>(v[4], v[5]), device::pack<T>(v[6], v[7]));
}

// 16 bytes: 4 floats or 8 elements of 16 bits.
N3_DEVICE void load_vector(const float* p, float (&v)[4]) {
  const float4 f = *reinterpret_cast<const float4*>(p);
  v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
}
template <typename T>
N3_DEVICE void load_vector(const T* p, float (&v)[8]) {
  load8(p, v);
}
N3_DEVICE void store_vector(float* p, const float (&v)[4]) {
  *reinterpret_cast<float4*>(p) = make_float4(v[0], v[1], v[2], v[3]);
}
template <typename T>
N3_DEVICE void store_vector(T* p, const float (&v)[8]) {
  store8(p, v);
}

// int64 offsets everywhere: tokens times channels, slots times states pass 2^31.
N3_DEVICE int64_t offset(const View& v, int64_t i, int64_t j = 0, int64_t k = 0, int64_t l = 0) {
  return i * v.strides[0] + j * v.strides[1] + k * v.strides[2] + l * v.strides[3];
}

// int32 or int64; where not given, the index itself.
struct IndexView {
  const void* data;
  bool wide;
  int64_t strides[2];

  N3_DEVICE int64_t operator()(int64_t i, int64_t j = 0) const {
    if (!data) return i;
    const int64_t at = i * strides[0] + j * strides[1];
    return wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
  }
};

// The number of a block as digits, the last one running fastest: in 32 bits, for the launchers' check_grid().
struct Digits {
  int64_t outer, middle, inner;
};

N3_DEVICE Digits digits(uint32_t block, int64_t middles, int64_t inners) {
  const uint32_t rest = block / uint32_t(inners), count = uint32_t(middles);
  return {rest / count, rest % count, block % uint32_t(inners)};
}

N3_DEVICE int64_t clamp(int64_t v, int64_t low, int64_t high) { return v < low ? low : v > high ? high : v; }

// v / (1 + e^-v): right at both ends, where e^-v is 0 or infinite.
N3_DEVICE float silu(float v) { return v / (1.f + expf(-v)); }

// clamp(softplus(dt), low, high): log1p(e^dt), and dt itself above 20. NaN stays.
N3_DEVICE float time_step(float dt, bool softplus, float low, float high) {
  if (softplus && !(dt > 20.f)) dt = log1pf(expf(dt));
  dt = dt < low ? low : dt;
  return dt > high ? high : dt;
}

// ---- the slots of an update

enum class Where : int32_t { kSource, kLast, kEach };  // the slot read; destination(b); destination(b, t) after token t

// Values were not checked on the host, which would wait for the device: what is out of range is padding, or clamped.
struct Slots {
  IndexView source;        // (b), or (b, num_accepted[b] - 1) where there are columns
  int64_t columns;         // of source; 0: it has one dimension
  Where where;
  IndexView destination;   // (b) or (b, t)
  IndexView num_accepted;  // (b); data null: not given, and so below
  IndexView num_tokens;    // (b)
  IndexView parents;       // (b, t)
  int64_t slots, batch, tokens;

  // The slot that sequence b reads; -1: padding.
  N3_DEVICE int64_t read(int64_t b) const {
    const int64_t slot = columns ? source(b, clamp(num_accepted(b), 1, columns) - 1) : source(b);
    return slot < slots && slot >= 0 ? slot : -1;
  }
  N3_DEVICE int64_t count(int64_t b) const { return num_tokens.data ? clamp(num_tokens(b), 0, tokens) : tokens; }
  N3_DEVICE int64_t parent(int64_t b, int64_t t) const {
    return parents.data ? clamp(parents(b, t), -1, t - 1) : t - 1;
  }
  // The slot that gets the state after token t of the first `count` (-1: after none of none); -1: it is not kept.
  N3_DEVICE int64_t written(int64_t b, int64_t t, int64_t count, int64_t source_slot) const {
    int64_t slot = -1;
    if (where == Where::kEach) {
      if (t >= 0 && t < count) slot = destination(b, t);
    } else if (t == count - 1) {
      slot = where == Where::kLast ? destination(b) : source_slot;
    }
    return slot < slots && slot >= 0 ? slot : -1;
  }
};

}  // namespace n3::mamba
