// Runs the kernels of experts_bwd_kernels.h over all groups of a problem.
#pragma once
#include <vector>

#include "../common/buffer.h"
#include "experts_bwd_kernels.h"

namespace n3::moe_bwd {

// slots: those of group g are starts[g] .. starts[g + 1] - 1. Writes the problem's outputs, zeros for a group without
// slots; of dx and dweights those of the slots.
void run(const Problem& p, Element element, const std::vector<Slot>& slots, const std::vector<int64_t>& starts);

// Memory for dx, count rows.
Buffer<float> row_floats(int64_t count, int64_t width);

// sum[i] = the sum, ascending, of the rows of `width` floats at `dx` that are listed in
// rows[starts[i] .. starts[i + 1] - 1], rounded to `out`, [starts.size() - 1, width].
void sum_rows(const float* dx, int64_t width, const std::vector<int64_t>& rows, const std::vector<int64_t>& starts,
              Element element, void* out);

}  // namespace n3::moe_bwd
