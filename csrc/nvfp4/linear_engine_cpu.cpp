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

// The decoding tables of the exponents, made at their first use and kept: making one takes longer than a small product.
class Tables {
 public:
  explicit Tables(const Decoding& decoding) : decoding_(decoding) {}

  const void* of(int exponent) {
    const int i = exponent - kMinExponent;
    std::call_once(made_[i], [&] {
      const auto values = buffer<float[16]>(sizeof(Values));
      auto& table_values = reinterpret_cast<Values&>(*values.get());
      fill_values(exponent, table_values);
      tables_[i] = buffer<char>(decoding_.table_bytes);
      decoding_.prepare(table_values, tables_[i].get());
    });
    return tables_[i].get();
  }

 private:
  static constexpr int kCount = kMaxExponent - kMinExponent + 1;
  const Decoding& decoding_;
  std::array<std::once_flag, kCount> made_;
  std::array<Buffer<char>, kCount> tables_;
};

Tables& tables(const Decoding& decoding) {
  static Tables lanes(kernels().decoding);
#if defined(__x86_64__)
  static Tables tiles(amx::kKernels.decoding);
  if (&decoding == &amx::kKernels.decoding) return tiles;
#endif
  return lanes;
}

}  // namespace

const Kernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::kAmx:
    case Isa::kAvx512: return kAvx512Kernels;
    case Isa::kAvx2: return kAvx2Kernels;
    case Isa::kGeneric: break;
  }
#endif
  return kGenericKernels;
}

const amx::Kernels* tile_kernels() {
#if defined(__x86_64__)
  if (cpu_isa() == Isa::kAmx) return &amx::kKernels;
#endif
  return nullptr;
}

GlobalScale split_global_scale(const Decoding& decoding, float global) {
  const int exponent = weight_exponent(global);
  return {tables(decoding).of(exponent), std::ldexp(global, -exponent)};
}

}  // namespace n3::nvfp4_linear
