// One call of the state update on the CPU, resolved: every index looked up and checked, small operands as floats,
// sources that another sequence would overwrite copied. ssm_update runs it whole, mamba2_decode in parts.
#pragma once
#include <vector>

#include "ssm_update.h"
#include "ssm_update_kernels.h"

namespace n3::ssm_update {

Element element_of(ScalarType dtype);
View view_of(const Operand& o);

// [rows, cols] as contiguous floats.
std::vector<float> floats_of(const Operand& o, int64_t rows, int64_t cols = 1);

class Call {
 public:
  // Raises in the name of `op` if a value is out of range. `p` and the tensors behind it outlive the call.
  Call(const char* op, const Params& p);
  Call(const Call&) = delete;

  int64_t items() const { return problem.batch * problem.heads * blocks(problem); }
  int64_t grain() const;  // fewest items worth a thread
  void run(int64_t begin, int64_t end) const;

  Problem problem;

 private:
  Slot slot(int64_t index);
  void resolve_sources(const char* op, const Params& p);
  void resolve_parents(const char* op, const Params& p);
  void resolve_destinations(const Params& p);
  void copy_endangered_sources(const Params& p);

  std::vector<float> A_, dt_bias_, D_;
  Operand state_, scale_;
  Layout layout_, packed_;
  int64_t seed_[2];
  std::vector<Sequence> sequences_;
  std::vector<int64_t> source_slots_, written_slots_;
  std::vector<Slot> written_;
  std::vector<int32_t> parents_;
  std::vector<std::vector<char>> copies_;
  std::vector<std::vector<float>> scale_copies_;
};

}  // namespace n3::ssm_update
