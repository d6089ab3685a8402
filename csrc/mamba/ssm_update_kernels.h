// What the launchers of ssm_update, and of the operators built on it, ask of each instruction set; all give the same
// bits. Plain data, no torch: *_avx512.cpp includes it too.
#pragma once
#include <cstdint>

#include "../common/numerics.h"

namespace n3::ssm_update {

enum class Element { kFloat, kHalf, kBFloat16, kInt8, kE4m3 };

// A per-token operand in place: strides of sequence, token, and its last dimensions, in elements. data null: none.
struct View {
  void* data;
  Element element;
  int64_t strides[4];
};

// How a slot's rows lie: strides of head, channel, state dimension; of head and channel in the scales.
struct Layout {
  int64_t state[3], scale[2];
};

// The state [H, P, N] of one slot. data null: none.
struct Slot {
  void* data;
  float* scale;          // null unless the elements have 8 bits
  const Layout* layout;
  uint64_t first;        // the number of its first element in a contiguous [slots, H, P, N]
};

struct Sequence {
  Slot source;             // data null: padding
  int64_t tokens;          // that are not padding
  const Slot* written;     // [T + 1]: where the state after 0, 1, ..., T tokens goes
  const int32_t* parents;  // [T]; null: a chain
};

struct Problem {
  int64_t batch, tokens, heads, head_dim, groups, d_state;
  View x, z, dt, B, C;
  const float *A, *dt_bias, *D;  // contiguous; dt_bias and D may be null
  bool D_has_channels;           // D is [H, P]
  Element state;
  const int64_t* seed;           // (key, offset) of stochastic rounding; null: to nearest
  bool dt_softplus;
  float dt_min, dt_max;
  const Sequence* sequences;     // [B]
  bool tree;                     // a sequence has parents
  View y;                        // strides: b, t, h, p
};

constexpr int64_t kBlock = 16;  // rows (channels of one head) of a work item
constexpr int64_t kTile = 16;   // lanes of every sum over the state dimension; workspace rows are padded to it
constexpr int64_t kRows = 4;    // rows that are updated together

N3_HD int64_t padded(int64_t n) { return (n + kTile - 1) / kTile * kTile; }

// Blocks of rows of a head. A work item is one of them, of one head of one sequence, counted in this order.
N3_HD int64_t blocks(const Problem& p) { return (p.head_dim + kBlock - 1) / kBlock; }

// Floats of workspace that a thread needs.
N3_HD int64_t workspace_floats(const Problem& p) {
  const int64_t n = padded(p.d_state), states = p.tree ? p.tokens + 1 : 1;
  return p.tokens * (2 * n + 3 * kBlock) + 2 * padded(p.tokens) + states * kRows * n + 2 * n + 8 * kTile;
}

struct Kernels {
  // Does the work items begin..end, which are independent of each other.
  void (*update)(const Problem& p, float* workspace, int64_t begin, int64_t end);
};

extern const Kernels kGenericKernels, kAvx2Kernels, kAvx512Kernels;

const Kernels& kernels();  // of the instruction set that cpu_isa() names; in ssm_update_cpu.cpp

}  // namespace n3::ssm_update
