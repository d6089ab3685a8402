// The instruction set a CPU kernel may use, found at run time, and dtype conversions of whole rows.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "numerics.h"

namespace n3 {

// kAmx is kAvx512 and bfloat16 tiles. An operator without tiles takes its AVX-512 kernels for it.
enum class Isa { kGeneric, kAvx2, kAvx512, kAmx };

inline const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAmx: return "amx";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    case Isa::kGeneric: return "generic";
  }
  return "generic";
}

// The processor has bfloat16 tiles, and Linux lets this process use them: their 8 KiB of state are given on request.
inline bool amx_allowed() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & (kAmxBf16 | kAmxTile)) != (kAmxBf16 | kAmxTile)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// The best set there is, up to `most`.
inline Isa detect_isa([[maybe_unused]] Isa most) {
  Isa found = Isa::kGeneric;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (most >= Isa::kAvx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    found = Isa::kAvx2;
  }
  if (most >= Isa::kAvx512 && found == Isa::kAvx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    found = Isa::kAvx512;
  }
  if (most >= Isa::kAmx && found == Isa::kAvx512 && amx_allowed()) found = Isa::kAmx;
#endif
  return found;
}

// N3_CPU_ISA=generic|avx2|avx512|amx lowers the choice, never raises it. Read once.
inline Isa cpu_isa() {
  static const Isa isa = [] {
    const char* wanted = std::getenv("N3_CPU_ISA");
    for (const Isa most : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512}) {
      if (wanted && !std::strcmp(wanted, isa_name(most))) return detect_isa(most);
    }
    return detect_isa(Isa::kAmx);
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
