// What ssd_scan_cpu.cpp asks of each instruction set, and the arithmetic all of them keep.
//
// A chunk of 64 tokens of one head, a its inclusive sums of A dt in double (as two floats), H the state entering:
//   M_ij = (C_i . B_j) exp(a_i - a_j) dt_j, i >= j
//   y_i = exp(a_i) (C_i H^T) + sum_{j <= i} M_ij x_j, then + D x_i, then * silu(z_i)
//   H <- exp(a_end) H + sum_j B_j (x_j dt_j exp(a_end - a_j))
// Every sum is one chain of fused multiply-adds in the order of d_state or of the tokens. So the bits of an output
// depend neither on how the work is divided nor on the vectors, and those of token i on no later token.
#pragma once
#include <cstdint>

#include "ssd_scan.h"

namespace n3::ssd_scan {

// The scan as other operators use it: operands as check() or check_slots() leave them, y and final filled in. Checks the
// values of the indices, names `op` in its messages, and writes nothing when it throws.
void run_cpu(const Params& p);

struct Checkpoint {
  int64_t token, slot;  // the token of its sequence after which the state is kept
};

// What goes before and behind the scan of a chunk, where it is a part of something larger. x, B, C and y are then rows of
// the chunk alone, row i that of its token i, all sequences' in one place.
class Stage {
 public:
  // Of the chunk in its sequence; steps: how often meanwhile() will be called.
  virtual void before(int64_t start, int64_t tokens, int64_t steps) = 0;
  // Between tiles of the scan: to ask for memory that before() and after() will go to.
  virtual void meanwhile() = 0;
  virtual void after(int64_t start, int64_t tokens) = 0;

 protected:
  ~Stage() = default;
};

// Panels begin <= i < end of a group's heads, for all tokens of one sequence. Panel i is columns (i % panels) * width
// and on of head i / panels of the group: heads of a group share C . B, panels of a head M besides.
struct Item {
  int64_t sequence, first, length;  // first: the packed token where the sequence begins, else 0
  int64_t slot;
  bool has_initial;
  const Checkpoint* checkpoints;
  int64_t checkpoint_count;
  int64_t group, begin, end;
  Stage* stage = nullptr;
};

struct Kernels {
  int64_t panel_width;
  int64_t (*scratch_floats)(const Params& p, int64_t panels);  // of an item of so many panels
  void (*run)(const Params& p, const Item& item, float* scratch);
};

extern const Kernels kGenericKernels, kAvx2Kernels, kAvx512Kernels;

const Kernels& kernels();  // those of n3::cpu_isa()

inline int64_t panels_of(const Kernels& kernel, int64_t head_dim) {
  return (head_dim + kernel.panel_width - 1) / kernel.panel_width;
}

}  // namespace n3::ssd_scan
