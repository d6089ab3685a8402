// The backward scan on the CPU: outputs, the division of the work and the sums over sequences and heads;
// ssd_scan_bwd_kernels.h has the arithmetic.
#define N3_LANES 4
#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "sequences_cpu.h"
#include "ssd_scan_bwd_lanes.h"

namespace n3::ssd_scan_bwd {

const Kernels kGenericKernels = kBackwardKernels;

namespace {

using ssd_scan::Sequence;
using torch::stable::parallel_for;

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

// Heads that one item takes, whose sum is one chain: all of a group, or of a large one eight, so that models with one
// or two groups have work for some threads. A function of the model alone: bits must depend on nothing else.
int64_t heads_of_item(const ssd_scan::Params& f) {
  const int64_t of_group = f.heads / f.groups;
  return std::max<int64_t>(1, f.groups >= 4 ? of_group : std::min<int64_t>(of_group, 8));
}

// Gradients of B or C by one part of the groups' heads, float32: strides sequence, token, group, state dimension.
Operand part_of(std::vector<float>& parts, int64_t part, int64_t floats, const ssd_scan::Params& f) {
  const int64_t token = f.groups * f.d_state;
  return {parts.data() + part * floats, ScalarType::Float, {f.length * token, token, f.d_state, 1}};
}

void add_parts(const std::vector<float>& parts, int64_t count, int64_t floats, const Operand& out) {
  parallel_for(0, floats, 1 << 14, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(parts.begin() + begin, parts.begin() + end);
    for (int64_t part = 1; part < count; ++part) {
      for (int64_t i = begin; i < end; ++i) sum[i - begin] += parts[part * floats + i];
    }
    narrow(sum.data(), end - begin, out, begin, 1);
  });
}

void fill_zeros(const Operand& o, int64_t first, int64_t count) {
  const int64_t size = o.dtype == ScalarType::Float ? 4 : 2;
  if (o.data) std::fill_n(static_cast<char*>(o.data) + first * size, count * size, char(0));
}

// Adds the partial sums of the sequences in their order.
void write_sums(const Params& p, const std::vector<Partial>& partials) {
  const ssd_scan::Params& f = p.forward;
  const bool by_channel = p.dD.data && p.dD.strides[1] != 0;
  for (int64_t h = 0; h < f.heads; ++h) {
    double dA = 0, ddt_bias = 0;
    std::vector<double> dD(f.head_dim);
    for (int64_t s = 0; s < f.sequences; ++s) {
      const Partial& partial = partials[s * f.heads + h];
      dA += partial.dA, ddt_bias += partial.ddt_bias;
      for (int64_t c = 0; c < f.head_dim; ++c) dD[c] += partial.dD[c];
    }
    const auto put = [&](const Operand& o, int64_t at, double v) {
      const float narrowed = float(v);
      if (o.data) narrow(&narrowed, 1, o, at, 1);
    };
    put(p.dA, h, dA);
    put(p.ddt_bias, h, ddt_bias);
    double sum = 0;
    for (int64_t c = 0; c < f.head_dim; ++c) {
      sum += dD[c];
      if (by_channel) put(p.dD, h * f.head_dim + c, dD[c]);
    }
    if (!by_channel) put(p.dD, h, sum);
  }
}

void run(const Params& p) {
  const ssd_scan::Params& f = p.forward;
  const std::vector<Sequence> sequences = ssd_scan::sequences_of(f);
  const int64_t last = f.cu_seqlens.data ? f.cu_seqlens(f.sequences) : f.tokens, padding = f.tokens - last;
  const int64_t per_x = f.heads * f.head_dim, per_B = f.groups * f.d_state, of_group = f.heads / f.groups;
  for (const auto& [o, per_token] : {std::pair{p.dx, per_x}, {p.dz, per_x}, {p.dB, per_B}, {p.dC, per_B}, {p.ddt, f.heads}}) {
    fill_zeros(o, last * per_token, padding * per_token);
  }
  const int64_t heads = heads_of_item(f), parts = std::max<int64_t>(1, (of_group + heads - 1) / heads);
  const int64_t floats = f.tokens * per_B;
  std::vector<float> dB(parts > 1 ? parts * floats : 0), dC(dB.size());
  std::vector<float> dD(f.sequences * per_x);
  std::vector<Partial> partials(f.sequences * f.heads);
  for (size_t i = 0; i < partials.size(); ++i) partials[i].dD = dD.data() + i * f.head_dim;

  std::vector<Item> items;
  int64_t longest = 0;
  for (const Sequence& s : sequences) {
    longest = std::max(longest, s.length);
    for (int64_t i = 0; i < f.groups * parts; ++i) {
      const int64_t group = i / parts, part = i % parts, begin = group * of_group + part * heads;
      const int64_t end = std::min(begin + heads, (group + 1) * of_group);
      items.push_back({s.number, s.first, s.length, group, begin, end,
                       parts > 1 ? part_of(dB, part, floats, f) : p.dB, parts > 1 ? part_of(dC, part, floats, f) : p.dC,
                       partials.data() + s.number * f.heads + begin});
    }
  }
  std::stable_sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.length > b.length; });
  const Kernels& kernel = kernels();
  const int64_t scratch = kernel.scratch_floats(p, heads, longest);
  std::atomic<size_t> next{0};
  parallel_for(0, int64_t(items.size()), 1, [&](int64_t, int64_t) {
    float* memory = ssd_scan::scratch_of_thread(scratch);
    for (size_t i = next++; i < items.size(); i = next++) kernel.run(p, items[i], memory);
  });
  if (parts > 1) {
    add_parts(dB, parts, floats, p.dB);
    add_parts(dC, parts, floats, p.dC);
  }
  write_sums(p, partials);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients backward(const Tensor& grad_y, const OptionalTensor& grad_final_states, const Tensor& x, const Tensor& dt,
                   const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                   const OptionalTensor& dt_bias, const OptionalTensor& initial_states,
                   const OptionalTensor& cu_seqlens, int64_t chunk_size, bool dt_softplus, double dt_min,
                   std::optional<double> dt_max) {
  Params p = check(grad_y, grad_final_states, x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, chunk_size,
                   dt_softplus, dt_min, dt_max);
  const bool packed = cu_seqlens.has_value();
  const auto like = [&](const OptionalTensor& t) {
    return t ? torch::stable::new_empty(*t, t->sizes()) : torch::stable::new_empty(x, {0});
  };
  const auto per_token = [&](const OptionalTensor& given, const Tensor& gradient) {
    return given ? ssd_scan::tokens_operand(gradient, packed) : Operand{};
  };
  const auto whole = [&](const OptionalTensor& given, const Tensor& gradient) {
    return given ? mamba::operand_of(gradient) : Operand{};
  };
  const Tensor dx = like(x), ddt = like(dt), dA = like(A), dB = like(B), dC = like(C), dD = like(D), dz = like(z),
               ddt_bias = like(dt_bias), dinitial = like(initial_states);
  p.dx = per_token(x, dx), p.ddt = per_token(dt, ddt), p.dB = per_token(B, dB), p.dC = per_token(C, dC);
  p.dz = per_token(z, dz), p.dA = whole(A, dA), p.dD = whole(D, dD), p.ddt_bias = whole(dt_bias, ddt_bias);
  p.dinitial = whole(initial_states, dinitial);
  run(p);
  return {dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial};
}

}  // namespace
}  // namespace n3::ssd_scan_bwd

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("ssd_scan_bwd", TORCH_BOX(&n3::ssd_scan_bwd::backward)); }
