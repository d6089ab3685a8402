// The tensors of a call as the kernels of every backend see them, on host and device, without torch. Null: not given.
// Rules in n3kernels/mtp/sample.py, verify.py, verify_tree.py and draft_sample.py.
#pragma once
#include "plan.h"

namespace n3::mtp {

// Rows of logits, the parameters of the slots, and what is edited in single rows.
struct RowInputs {
  const void* logits;
  int64_t stride;                    // of a row, in elements
  int32_t type, vocab, rows, slots;  // 0 to 2: float, half, bfloat16
  const int32_t* slot;               // by row or request
  const int64_t* seed;               // by slot, as those behind
  const float *temperature, *top_p, *min_p;
  const int32_t* top_k;
  const int32_t *bitmask, *bitmask_row, *forced, *bias_ids, *bias_cu;
  const float* bias_val;
  int32_t mask_rows, biases;
};

struct SampleArgs {
  const int64_t* pos;  // by row or request
  int32_t *tokens, *flags;
  float* logprobs;
};

struct DraftSampleArgs {
  const int64_t* pos;
  const int32_t* map;  // the token of each column; null: its own
  int32_t *tokens, *ids;
  float* probs;
  int32_t max_ids;
};

// The laws of the drafts: by row `entries` ids with their probabilities. Without ids drafts are certain, or their laws
// are softmaxes of the drafter's logits.
struct LawInputs {
  const int32_t* ids;
  const float* probs;
  const int32_t* map;  // the token of each id and of each of the drafter's columns; null: its own
  int32_t entries, mapped;
};

// What verification of chains and of trees takes and leaves.
struct WalkArgs {
  const int32_t *cu_rows, *drafts, *eos;
  const int64_t* pos;
  const double* uniforms;             // by row; null: Philox's
  LawInputs laws;
  int32_t requests, width, eos_count;  // a request emits up to `width` tokens
  int32_t *tokens, *num_emitted, *flags;
  float* logprobs;
};

struct VerifyArgs : WalkArgs {
  VerifyMode mode;
  int64_t relaxed_top_k;
  double relaxed_delta, typical_epsilon, typical_delta;
  int32_t* last_row;
};

struct TreeArgs : WalkArgs {
  TreeMode mode;
  const int32_t* parents;
  int32_t* path;
};

}  // namespace n3::mtp
