// NVFP4 weights of groups as kernels of sm_90a read them where they lie, for launchers.
#pragma once
#include "../common/tensor_map.h"
#include "nvfp4_codes.cuh"

namespace n3::moe_experts::sm90::nvfp4 {

struct PackedWeights {
  const Tensor &codes, &scale, &global;  // [groups, n, k / 2], [groups, n, k / 16], [groups]
};

// Why the kernels do not take these weights, or null: of rows of codes the copy engine wants each two to begin at a
// multiple of 16 bytes. _nvfp4_rows in n3kernels/moe/_supports.py says the same.
inline const char* unsupported(const PackedWeights& w) {
  const auto fits = [&w](int dim, int64_t bytes) {
    return w.codes.size(dim) <= 1 || (w.codes.stride(dim) > 0 && w.codes.stride(dim) % bytes == 0);
  };
  if (w.codes.stride(2) != 1 || !fits(1, 8) || !fits(0, 16) ||
      reinterpret_cast<uintptr_t>(w.codes.const_data_ptr()) % 16) {
    return "takes codes whose rows are contiguous, each two beginning at a multiple of 16 bytes";
  }
  if (w.scale.size(2) > 1 && w.scale.stride(2) != 1) return "takes scales whose rows are contiguous";
  return nullptr;
}

// From row to row, in pairs of bytes.
inline int64_t pitch_of(const Tensor& codes) { return codes.stride(1) / 2; }

// [groups, n / 2, two rows as pairs of bytes] in boxes of `rows` rows of one parity and 64 bytes.
inline CUtensorMap map_of(const char* op, const Tensor& codes, int rows) {
  const int64_t pitch = pitch_of(codes);
  return tensor_map(op, ScalarType::BFloat16, codes.const_data_ptr(),
                    {pitch + codes.size(2) / 2, codes.size(1) / 2, codes.size(0), 1},
                    {2 * pitch, codes.stride(0) / 2, 0}, {32, rows, 1, 1});
}

// `global`: the same, contiguous.
inline Scales scales_of(const Tensor& scale, const Tensor& global) {
  return {static_cast<const uint8_t*>(scale.const_data_ptr()), scale.stride(0), scale.stride(1),
          static_cast<const float*>(global.const_data_ptr())};
}

}  // namespace n3::moe_experts::sm90::nvfp4
