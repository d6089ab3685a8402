// The scan on the CPU: sequences, slots and the division of the work; ssd_scan_kernels.h has the arithmetic.
#define N3_LANES 4
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <sstream>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/written.h"
#include "sequences_cpu.h"
#include "written_slots.h"
#include "ssd_scan_lanes.h"

namespace n3::ssd_scan {

const Kernels kGenericKernels = kKernels;

const Kernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::kAmx:
    case Isa::kAvx512: return kAvx512Kernels;
    case Isa::kAvx2: return kAvx2Kernels;
    case Isa::kGeneric: break;
  }
#endif
  return kGenericKernels;
}

namespace {

// ---- sequences

// Gives each checkpoint to the sequence that has its token; one behind the last sequence is not written.
void add_checkpoints(const Params& p, std::vector<Sequence>& sequences) {
  for (int64_t k = 0; k < p.checkpoints; ++k) {
    const int64_t token = p.checkpoint_tokens(k), slot = p.checkpoint_indices(k);
    const auto begin = [&](const Sequence& s) { return p.cu_seqlens.data ? s.first : s.number * p.length; };
    // The last sequence that begins at the token or before it, of which empty ones come first.
    const auto after = std::upper_bound(sequences.begin(), sequences.end(), token,
                                        [&](int64_t t, const Sequence& s) { return t < begin(s); });
    if (slot < 0 || after == sequences.begin()) continue;
    Sequence& owner = *std::prev(after);
    if (token - begin(owner) < owner.length) owner.checkpoints.push_back({token - begin(owner), slot});
  }
}

void fill_zeros(const Params& p, int64_t first, int64_t tokens) {
  const int64_t bytes = p.heads * p.head_dim * (p.x.dtype == ScalarType::Float ? 4 : 2);
  std::fill_n(static_cast<char*>(p.y) + first * bytes, tokens * bytes, char(0));
}

// ---- the division of the work

// Into how many items each group of a sequence is split. Splitting a group repeats C . B, splitting a head repeats M
// too, so the estimate of the slowest thread's time decides; costs in multiply-adds per token.
int64_t parts_of_group(const Params& p, const std::vector<Sequence>& sequences, int64_t panels, int64_t width) {
  const int64_t per_group = p.heads / p.groups * panels, threads = torch::stable::get_num_threads();
  int64_t longest = 0, tokens = 0;
  for (const Sequence& s : sequences) longest = std::max(longest, s.length), tokens += s.length;
  if (tokens == 0 || threads == 1) return 1;
  const double groups = double(tokens) / longest * p.groups;  // as if all sequences were of the longest's length
  const double shared = 40. * p.d_state, head = 400, panel = (2. * p.d_state + 34) * width;
  int64_t best = 1;
  double least = 0;
  for (int64_t parts = 1; parts <= per_group && parts < 4 * threads; ++parts) {
    const double most = double((per_group + parts - 1) / parts), rounds = std::ceil(groups * parts / threads);
    const double time = rounds * (shared + std::ceil(most / panels) * head + most * panel);
    if (parts == 1 || time < least) best = parts, least = time;
  }
  return best;
}

}  // namespace

void run_cpu(const Params& p) {
  std::vector<Sequence> sequences = sequences_of(p);
  if (p.slots || p.state_indices.data) add_checkpoints(p, sequences);
  mamba::check_distinct(op, sequences);
  const int64_t last = p.cu_seqlens.data ? p.cu_seqlens(p.sequences) : p.tokens;
  fill_zeros(p, last, p.tokens - last);

  const Kernels& kernel = kernels();
  const int64_t panels = panels_of(kernel, p.head_dim), per_group = p.heads / p.groups * panels;
  const int64_t parts = std::max<int64_t>(1, parts_of_group(p, sequences, panels, kernel.panel_width));
  std::vector<Item> items;
  for (const Sequence& s : sequences) {
    if (s.slot < 0) {
      fill_zeros(p, p.cu_seqlens.data ? s.first : s.number * p.length, s.length);
      continue;
    }
    for (int64_t i = 0; i < p.groups * parts; ++i) {
      const int64_t group = i / parts, part = i % parts;
      items.push_back({s.number, s.first, s.length, s.slot, s.has_initial, s.checkpoints.data(),
                       int64_t(s.checkpoints.size()), group, per_group * part / parts, per_group * (part + 1) / parts,
                       nullptr});
    }
  }
  // Long sequences first: the last items to be taken are short.
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.length > b.length; });
  const int64_t scratch = kernel.scratch_floats(p, (per_group + parts - 1) / parts);
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, int64_t(items.size()), 1, [&](int64_t, int64_t) {
    float* memory = scratch_of_thread(scratch);
    for (size_t i = next++; i < items.size(); i = next++) kernel.run(p, items[i], memory);
  });
}

namespace {

std::tuple<Tensor, Tensor> scan(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                                const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                                const OptionalTensor& initial_states, const OptionalTensor& cu_seqlens,
                                int64_t chunk_size, bool dt_softplus, double dt_min, std::optional<double> dt_max) {
  Params p = check(x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, chunk_size, dt_softplus, dt_min, dt_max);
  const Tensor y = torch::stable::new_empty(x, x.sizes());
  const Tensor final_states =
      torch::stable::new_empty(x, {p.sequences, p.heads, p.head_dim, p.d_state}, ScalarType::Float);
  p.y = y.mutable_data_ptr();
  p.final = mamba::operand_of(final_states);
  run_cpu(p);
  return {y, final_states};
}

Tensor scan_slots(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                  const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias, Tensor state,
                  const Tensor& state_indices, const OptionalTensor& has_initial, const OptionalTensor& cu_seqlens,
                  const OptionalTensor& checkpoint_tokens, const OptionalTensor& checkpoint_indices,
                  int64_t chunk_size, bool dt_softplus, double dt_min, std::optional<double> dt_max) {
  Params p = check_slots(x, dt, A, B, C, D, z, dt_bias, state, state_indices, has_initial, cu_seqlens,
                         checkpoint_tokens, checkpoint_indices, chunk_size, dt_softplus, dt_min, dt_max);
  check_written(op, "state", state);
  const Tensor y = torch::stable::new_empty(x, x.sizes());
  p.y = y.mutable_data_ptr();
  run_cpu(p);
  return y;
}

}  // namespace
}  // namespace n3::ssd_scan

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) {
  m.impl("ssd_scan", TORCH_BOX(&n3::ssd_scan::scan));
  m.impl("ssd_scan.slots", TORCH_BOX(&n3::ssd_scan::scan_slots));
}
