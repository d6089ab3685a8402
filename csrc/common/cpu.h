// The instruction set a CPU kernel may use, found at run time, and dtype conversions of whole rows.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "numerics.h"

namespace n3 {

enum class Isa { kGeneric, kAvx2, kAvx512 };

inline const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    case Isa::kGeneric: return "generic";
  }
  return "generic";
}

inline Isa detect_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return avx2 && avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kGeneric;
#else
  return Isa::kGeneric;
#endif
}

// N3_CPU_ISA=generic|avx2|avx512 lowers the choice, never raises it. Read once.
inline Isa cpu_isa() {
  static const Isa isa = [] {
    const Isa found = detect_isa();
    const char* wanted = std::getenv("N3_CPU_ISA");
    if (!wanted) return found;
    if (!std::strcmp(wanted, "generic")) return Isa::kGeneric;
    if (!std::strcmp(wanted, "avx2")) return found < Isa::kAvx2 ? found : Isa::kAvx2;
    return found;
  }();
  return isa;
}

// Elements of a 16-bit tensor, told apart by type; a float32 tensor is plain float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

N3_HD float to_float(float v) { return v; }
N3_HD float to_float(Half v) { return half_to_float(v.bits); }
N3_HD float to_float(BFloat16 v) { return bf16_to_float(v.bits); }

template <typename T>
N3_HD T from_float(float v);
template <>
N3_HD float from_float<float>(float v) {
  return v;
}
template <>
N3_HD Half from_float<Half>(float v) {
  return {half_from_float(v)};
}
template <>
N3_HD BFloat16 from_float<BFloat16>(float v) {
  return {bf16_from_float(v)};
}

}  // namespace n3
