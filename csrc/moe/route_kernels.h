// What route_cpu.cpp asks of each instruction set; all give the same bits. Formulas in route.h.
#pragma once
#include "route_plan.h"

namespace n3::moe_route {

struct Options {
  int64_t experts, top_k, n_group, topk_group;
  bool softmax, normalize;
  float scale;
};

// `tokens` rows, one behind the other but for the logits' stride; a row's elements are neighbours.
struct Rows {
  const void* logits;
  int64_t stride;             // of a row of logits
  const float* bias;          // null: none
  const int32_t* expert_map;  // null: none
  int32_t* ids;
  float* weights;
  int32_t* counts;  // [experts], added to
  int32_t* flags;
  int64_t tokens;
};

struct BackwardRows {
  const float* grad;  // of the weights
  int64_t grad_strides[2];
  const void* logits;
  int64_t stride;
  const int32_t* ids;
  void* out;
  int64_t tokens;
};

// Indexed by Element: the type of the logits.
struct Kernels {
  void (*forward[3])(const Options&, const Rows&);
  void (*backward[3])(const Options&, const BackwardRows&);
};

extern const Kernels kGenericKernels, kAvx2Kernels, kAvx512Kernels;

}  // namespace n3::moe_route
