// Gradients of weights: sums that blocks leave, and where their totals go.
#pragma once
#include "partial_sums_plan.h"
#include "views.cuh"

namespace n3::mamba {

// partial [pieces, rows, channels]: rows k < width are those of weight[c, k], the one behind, where there is one, of
// bias[c].
struct SumArgs {
  const float* partial;
  int64_t pieces, rows, width, channels;
  View weight, bias;  // contiguous; bias.data null: not wanted
};

}  // namespace n3::mamba
