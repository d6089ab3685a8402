// Device helpers without torch: 16-bit floats, vector loads, reductions, asynchronous copies, tensor cores.
//
// All inline PTX of the library's plain kernels is here, each beside its meaning in C++: where this file is compiled
// for a CPU (tests run the kernels under an emulator of blocks and threads), the meaning runs.
#pragma once
#include <cfloat>
#include <cstdint>
#include <type_traits>

#include "numerics.h"

#if !defined(__CUDACC__)
#include "cuda_emulator.h"  // of tests/cuda_emulator
#endif

#define N3_DEVICE __device__ __forceinline__

namespace n3::device {

// ---- 16-bit floats

struct F16 {
  uint16_t bits;
};
struct BF16 {
  uint16_t bits;
};

N3_DEVICE float widen(float v) { return v; }
N3_DEVICE float widen(BF16 v) { return bf16_to_float(v.bits); }
N3_DEVICE float widen(F16 v) {
#if defined(__CUDACC__)
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v.bits));
  return f;
#else
  return half_to_float(v.bits);
#endif
}

// Two floats to nearest even, `lo` in the lower half of the word.
template <typename T>
N3_DEVICE uint32_t pack(float lo, float hi);
template <>
N3_DEVICE uint32_t pack<F16>(float lo, float hi) {
#if defined(__CUDACC__)
  uint32_t w;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(hi), "f"(lo));
  return w;
#else
  return half_from_float(lo) | uint32_t(half_from_float(hi)) << 16;
#endif
}
template <>
N3_DEVICE uint32_t pack<BF16>(float lo, float hi) {
#if defined(__CUDACC__)
  uint32_t w;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(hi), "f"(lo));
  return w;
#else
  return bf16_from_float(lo) | uint32_t(bf16_from_float(hi)) << 16;
#endif
}

template <typename T>
N3_DEVICE T narrow(float v) {
  return T{uint16_t(pack<T>(v, 0.f))};
}
template <>
N3_DEVICE float narrow<float>(float v) {
  return v;
}

// Products of the halves of a and the lower (kHalf 0) or upper half of b, to nearest even; subnormals count.
template <typename T, int kHalf>
N3_DEVICE uint32_t scale_pair(uint32_t a, uint32_t b) {
#if defined(__CUDACC__)  // a pair moved so becomes an operand's selector .H0_H0 or .H1_H1
  uint32_t d;
#define N3_SCALE_PAIR(product, half)                                                                          \
  asm("{\n.reg .b16 l, h;\n.reg .b32 s;\nmov.b32 {l, h}, %2;\nmov.b32 s, {" half ", " half "};\n" product "\n}" \
      : "=r"(d)                                                                                               \
      : "r"(a), "r"(b), "r"(0x80008000))
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900  // no product of bfloat16 alone: -0 is added
#define N3_SCALE_BF16 "fma.rn.bf16x2 %0, %1, s, %3;"
#else
#define N3_SCALE_BF16 "mul.rn.bf16x2 %0, %1, s;"
#endif
  if constexpr (std::is_same_v<T, BF16>) {
    if constexpr (kHalf == 0) N3_SCALE_PAIR(N3_SCALE_BF16, "l");
    if constexpr (kHalf == 1) N3_SCALE_PAIR(N3_SCALE_BF16, "h");
  } else {
    if constexpr (kHalf == 0) N3_SCALE_PAIR("mul.rn.f16x2 %0, %1, s;", "l");
    if constexpr (kHalf == 1) N3_SCALE_PAIR("mul.rn.f16x2 %0, %1, s;", "h");
  }
#undef N3_SCALE_PAIR
#undef N3_SCALE_BF16
  return d;
#else
  const float factor = widen(T{uint16_t(b >> 16 * kHalf)});
  return pack<T>(widen(T{uint16_t(a)}) * factor, widen(T{uint16_t(a >> 16)}) * factor);
#endif
}

// Bytes kFirst and kFirst + 1 of v in the lower bytes of the halves of a word.
template <int kFirst>
N3_DEVICE uint32_t spread_bytes(uint32_t v) {
#if defined(__CUDACC__)
  return __byte_perm(v, 0, kFirst | 0x40 | (kFirst + 1) << 8 | 0x4000);
#else
  return (v >> 8 * kFirst & 0xff) | (v >> 8 * (kFirst + 1) & 0xff) << 16;
#endif
}

// ---- 16 neighbouring elements, 16-byte aligned

N3_DEVICE void load16(const float* p, float (&v)[16]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float4 f = reinterpret_cast<const float4*>(p)[i];
    v[4 * i] = f.x, v[4 * i + 1] = f.y, v[4 * i + 2] = f.z, v[4 * i + 3] = f.w;
  }
}

template <typename T>
N3_DEVICE void load16(const T* p, float (&v)[16]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 u = reinterpret_cast<const uint4*>(p)[i];
    const uint32_t words[4] = {u.x, u.y, u.z, u.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[8 * i + 2 * j] = widen(T{uint16_t(words[j])});
      v[8 * i + 2 * j + 1] = widen(T{uint16_t(words[j] >> 16)});
    }
  }
}

N3_DEVICE void store16(float* p, const float (&v)[16]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    reinterpret_cast<float4*>(p)[i] = make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
  }
}

template <typename T>
N3_DEVICE void store16(T* p, const float (&v)[16]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float* f = v + 8 * i;
    reinterpret_cast<uint4*>(p)[i] =
        make_uint4(pack<T>(f[0], f[1]), pack<T>(f[2], f[3]), pack<T>(f[4], f[5]), pack<T>(f[6], f[7]));
  }
}

// ---- reductions, in a fixed order

// The sum over a warp, in every lane: pairs 16 apart first.
N3_DEVICE float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// The maximum over a block of kThreads, in every thread. Not to be called twice without a barrier between.
template <int kThreads>
N3_DEVICE uint32_t block_max(uint32_t v) {
  __shared__ uint32_t of_warp[kThreads / 32];
#pragma unroll
  for (int offset = 16; offset; offset /= 2) v = max(v, __shfl_xor_sync(0xffffffffu, v, offset));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = v;
  __syncthreads();
  uint32_t top = 0;
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) top = max(top, of_warp[w]);
  return top;
}

// ---- asynchronous copies to shared memory (sm_80)

// kBytes are 8 or 16, both addresses multiples of it. Where not `valid`, zeros are written and nothing is read.
template <int kBytes>
N3_DEVICE void copy_async(void* to, const void* from, bool valid) {
  static_assert(kBytes == 8 || kBytes == 16);
#if defined(__CUDACC__)
  const uint32_t at = uint32_t(__cvta_generic_to_shared(to));
  const int bytes = valid ? kBytes : 0;
  if constexpr (kBytes == 16) {  // .cg: past L1, which the other kind cannot
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
  }
#else
  emulate_copy(to, from, kBytes, valid);
#endif
}

// Ends a group of copies.
N3_DEVICE void commit_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulate_commit();
#endif
}

// Waits until at most kPending of this thread's latest groups are under way.
template <int kPending>
N3_DEVICE void wait_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#else
  emulate_wait(kPending);
#endif
}

// ---- read-once loads, past L1; volatile, or they might move to before the end of the kernels before

template <typename V>
N3_DEVICE V load_once(const void* p) {
#if defined(__CUDACC__)
  V v;
  if constexpr (sizeof(V) == 16) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(p)
        : "memory");
  } else {
    static_assert(sizeof(V) == 8);
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  }
  return v;
#else
  if (uintptr_t(p) % sizeof(V)) emulator::die("a load is not aligned");
  return *static_cast<const V*>(p);
#endif
}

// ---- tensor cores (sm_80)

// Four 8 x 8 matrices of 16-bit elements in shared memory, row r of matrix i beginning, 16-byte aligned, where lane
// 8 i + r says: of matrix i this lane gets elements 2t and 2t + 1 of row g (g = lane / 4, t = lane % 4).
N3_DEVICE void load_matrices(const void* row, uint32_t (&d)[4]) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
#else
  emulate_load_matrices(row, d);
#endif
}

// c += a b for one warp, a [16, 16], b [16, 8], c [16, 8]. With g = lane / 4 and t = lane % 4 a lane holds
//   a: (g, 2t..2t+1), (g + 8, same), (g, 2t+8..2t+9), (g + 8, same)     b: (2t..2t+1, g), (2t+8..2t+9, g)
//   c: (g, 2t), (g, 2t+1), (g + 8, 2t), (g + 8, 2t+1)
template <typename T>
N3_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
N3_DEVICE void mma_m16n8k16<BF16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulate_mma(c, a, b, [](uint16_t bits) { return bf16_to_float(bits); });
#endif
}
template <>
N3_DEVICE void mma_m16n8k16<F16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulate_mma(c, a, b, [](uint16_t bits) { return half_to_float(bits); });
#endif
}

}  // namespace n3::device
