// What gated_norm_cpu.cpp and the fused mixer ask of each instruction set; all give the same bits. A kernel is chosen
// once by kernels() and called for one row at a time; formulas in gated_norm.h.
#pragma once
#include <cstdint>

namespace n3::gated_norm {

// A group is summed in kSums interleaved partial sums, element i in sum i % kSums, whatever the vectors' length.
constexpr int64_t kSums = 32;
constexpr int64_t scratch_floats(int64_t group_size) { return (group_size + kSums - 1) / kSums * kSums; }

// `groups` groups of group_size elements, one behind the other.
struct Row {
  const void *x, *z;    // z null: no gate
  const float* weight;  // groups * group_size
  void* y;
  float* scratch;       // scratch_floats(group_size); not x, z, weight or y
  int64_t groups, group_size;
  float eps;
  bool norm_before_gate;
  const void* next_z = nullptr;  // will be asked for in the next call; null: what lies behind z
};

// One group of one row. dweight is added to.
struct BackwardRow {
  const void *grad_y, *x, *z;
  const float* weight;
  void *dx, *dz;
  float* dweight;
  float* scratch;  // as above
  int64_t group_size;
  float eps;
  bool norm_before_gate;
};

// Indexed by Element.
struct Kernels {
  void (*forward[3])(const Row&);             // x, z and y of that type
  void (*forward_from_float[3])(const Row&);  // x float; z and y of that type: the mixer's, whose scan leaves floats
  void (*backward[3])(const BackwardRow&);    // all of that type but weight and dweight
};

extern const Kernels kGenericKernels, kAvx2Kernels, kAvx512Kernels;

const Kernels& kernels();  // those of n3::cpu_isa()

}  // namespace n3::gated_norm
