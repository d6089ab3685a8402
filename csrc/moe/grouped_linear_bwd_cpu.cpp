// The backward of grouped_linear on the CPU, by the engine of the experts' backward: a group is an expert without
// W_down.
#include "grouped_linear_bwd.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/kept_pages.h"
#include "experts_bwd_engine.h"
#include "products.h"

namespace n3::grouped_linear_bwd {
namespace {

using moe_bwd::Slot;

moe_bwd::Activation activation_of(grouped_linear::Activation a) {
  switch (a) {
    case grouped_linear::Activation::kRelu2: return moe_bwd::kRelu2;
    case grouped_linear::Activation::kSilu: return moe_bwd::kSilu;
    case grouped_linear::Activation::kGelu: return moe_bwd::kGelu;
    case grouped_linear::Activation::kNone: break;
  }
  return moe_bwd::kNone;
}

// The rows that read something, group by group, and for each row of x those that read it.
struct Sorted {
  std::vector<Slot> slots;
  std::vector<int64_t> starts;             // of each group, and the end
  std::vector<int64_t> rows, row_starts;  // of each row of x, and the end

  explicit Sorted(const Params& p) : row_starts(p.m + 1) {
    for (int64_t g = 0; g < p.groups; ++g) {
      starts.push_back(slots.size());
      for (int64_t r = p.offsets[g]; r < p.offsets[g + 1]; ++r) {
        const int64_t m = p.gather ? p.gather[r] : r;
        if (m < 0) continue;
        slots.push_back({r, m, r});
        ++row_starts[m + 1];
      }
    }
    starts.push_back(slots.size());
    for (int64_t m = 0; m < p.m; ++m) row_starts[m + 1] += row_starts[m];
    rows.resize(slots.size());
    std::vector<int64_t> next = row_starts;
    for (const Slot& slot : slots) rows[next[slot.x]++] = slot.at;
  }
};

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& x, const Tensor& w,
                                            const Tensor& offsets, const OptionalTensor& gather,
                                            const OptionalTensor& row_scale,
                                            const std::optional<std::string>& activation) {
  Params f = check(grad_y, x, w, offsets, gather, row_scale, activation);
  std::vector<Tensor> alive;
  const auto data = [&](const Tensor& t) { return alive.emplace_back(torch::stable::contiguous(t)).const_data_ptr(); };
  f.offsets = static_cast<const int32_t*>(data(offsets));
  f.gather = gather ? static_cast<const int32_t*>(data(*gather)) : nullptr;
  grouped_linear::check_values(op, f);

  const Tensor dx = torch::stable::new_empty(x, x.sizes()), dw = new_in_kept_pages(w);
  const Tensor dscale = torch::stable::new_empty(x, {row_scale ? f.rows : 0}, ScalarType::Float);
  auto* const dscale_data = static_cast<float*>(dscale.mutable_data_ptr());
  std::fill_n(dscale_data, dscale.numel(), 0.f);
  const auto rows = moe_bwd::row_floats(f.rows, f.k);
  moe_bwd::Problem p{};
  p.x = data(x), p.grad = data(grad_y), p.up = data(w);
  p.weights = row_scale ? static_cast<const float*>(data(*row_scale)) : nullptr;
  p.dweights = row_scale ? dscale_data : nullptr;
  p.dx = rows.get(), p.dup = dw.mutable_data_ptr();
  p.width = f.k, p.inner = f.outputs, p.halves = f.outputs < f.n ? 2 : 1;
  p.activation = activation_of(f.activation);
  const Sorted sorted(f);
  const Element element = element_of(x.scalar_type());
  moe_bwd::run(p, element, sorted.slots, sorted.starts);
  moe_bwd::sum_rows(rows.get(), f.k, sorted.rows, sorted.row_starts, element, dx.mutable_data_ptr());
  return {dx, dw, dscale};
}

}  // namespace
}  // namespace n3::grouped_linear_bwd

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("grouped_linear_bwd", TORCH_BOX(&n3::grouped_linear_bwd::backward)); }
