// What the launchers of ssm_replay_* ask of each instruction set; all give the same bits. Plain data, no torch.
#pragma once
#include "ssm_update_kernels.h"

namespace n3::ssm_replay {

using ssm_update::Element;
using ssm_update::kBlock;
using ssm_update::kRows;
using ssm_update::kTile;
using ssm_update::padded;
using ssm_update::Slot;

// One sequence, its state and the ring of its slot. Entry i is at (start + i) mod size.
struct Sequence {
  Slot state;              // data null: padding
  char *x, *B;             // the slot's ring, elements of the dtype of x
  float* dt;
  int64_t start, count;    // of the committed entries
  bool fold;               // they are folded into the state
  const int32_t* parents;  // [T]; null: a chain
};

// `update` without states and indices: x, z, dt, B, C, y of the T tokens, sizes, and how states are stored. A flush is
// an update of no tokens.
struct Problem {
  ssm_update::Problem update;
  int64_t size;                                    // R
  Element element;                                 // of the ring's x and B
  int64_t x_strides[3], B_strides[3], dt_strides[2];  // entry, head, channel; entry, group, n; entry, head
  const Sequence* sequences;
};

// Floats of workspace that a thread needs, behind those of the update.
N3_HD int64_t workspace_floats(const Problem& p) {
  const int64_t entries = padded(p.size + p.update.tokens), n = padded(p.update.d_state);
  return p.size * n + entries * (5 + kBlock + kRows + 2 * p.update.tokens) + padded(p.update.tokens) + 2 * kTile;
}

struct Kernels {
  // Does the work items begin..end of ssm_update, which are independent of each other.
  void (*replay)(const Problem& p, float* workspace, int64_t begin, int64_t end);
};

extern const Kernels kGenericKernels, kAvx2Kernels, kAvx512Kernels;

}  // namespace n3::ssm_replay
