#include "linear_engine.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <mutex>

#include "../common/cpu.h"
#include "linear_generic.h"

namespace n3::nvfp4_linear {

const Kernels kGenericKernels = kernels_of<Generic>();

namespace {

// The bounds keep every value of the table a normal bfloat16.
constexpr int kMinExponent = -108, kMaxExponent = 1;

int weight_exponent(float global) {
  if (!std::isfinite(global) || global == 0.f) return 0;
  return std::clamp(std::ilogb(global), kMinExponent, kMaxExponent);
}

void fill_values(int exponent, Values& values) {
  for (int scale = 0; scale < 256; ++scale) {
    const float factor = std::ldexp(e4m3_to_float(uint8_t(scale)), exponent);
    for (int code = 0; code < 16; ++code) values[scale][code] = e2m1_to_float(uint8_t(code)) * factor;
  }
}

// The decoding table of an exponent, made at its first use and kept: making one takes longer than a small product.
const void* table_of(const Kernels& kernel, int exponent) {
  constexpr int kCount = kMaxExponent - kMinExponent + 1;
  static std::array<std::once_flag, kCount> made;
  static std::array<Buffer<char>, kCount> tables;
  const int i = exponent - kMinExponent;
  std::call_once(made[i], [&] {
    const auto values = buffer<float[16]>(sizeof(Values));
    auto& table_values = reinterpret_cast<Values&>(*values.get());
    fill_values(exponent, table_values);
    tables[i] = buffer<char>(kernel.table_bytes);
    kernel.prepare(table_values, tables[i].get());
  });
  return tables[i].get();
}

}  // namespace

const Kernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::kAvx512: return kAvx512Kernels;
    case Isa::kAvx2: return kAvx2Kernels;
    case Isa::kGeneric: break;
  }
#endif
  return kGenericKernels;
}

GlobalScale split_global_scale(const Kernels& kernel, float global) {
  const int exponent = weight_exponent(global);
  return {table_of(kernel, exponent), std::ldexp(global, -exponent)};
}

}  // namespace n3::nvfp4_linear
