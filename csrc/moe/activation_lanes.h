// The activations in lanes; see common/lanes.h.
#pragma once
#include <cmath>

#include "../common/lanes.h"
#include "dense_kernels.h"

namespace n3::dense_linear {
namespace {

constexpr bool is_gated(Activation activation) { return activation == kSilu || activation == kGelu; }

template <Activation kActivation>
N3_LANE_FN F32 activation_of(F32 h) {
  if constexpr (kActivation == kSilu) return silu(h);
  if constexpr (kActivation == kRelu2) return h < 0.f ? F32{} : h * h;  // NaN stays
  if constexpr (kActivation == kGelu) {
    for (int i = 0; i < kLanes; ++i) h[i] = 0.5f * h[i] * std::erfc(h[i] * -0.70710678118654752f);
  }
  return h;
}

}  // namespace
}  // namespace n3::dense_linear
