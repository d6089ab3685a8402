#include "ssm_update_call.h"
#include "written_slots.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/cpu.h"
#include "../common/written.h"

#define N3_LANES 4  // the vectors every x86-64 and AArch64 has
#include "ssm_update_lanes.h"

namespace n3::ssm_update {

const Kernels kGenericKernels = {update};

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

Element element_of(ScalarType dtype) {
  switch (dtype) {  // the checks let nothing else through
    case ScalarType::Half: return Element::kHalf;
    case ScalarType::BFloat16: return Element::kBFloat16;
    case ScalarType::Char: return Element::kInt8;
    case ScalarType::Float8_e4m3fn: return Element::kE4m3;
    default: return Element::kFloat;
  }
}

View view_of(const Operand& o) {
  return {o.data, element_of(o.dtype), {o.strides[0], o.strides[1], o.strides[2], o.strides[3]}};
}

std::vector<float> floats_of(const Operand& o, int64_t rows, int64_t cols) {
  std::vector<float> floats(rows * cols);
  with_element(element_of(o.dtype), [&](auto t) {
    const auto* data = static_cast<const decltype(t)*>(o.data);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) {
        floats[r * cols + c] = element_to_float(data[r * o.strides[0] + c * o.strides[1]]);
      }
    }
  });
  return floats;
}

// ---- values of indices and counts

namespace {

void check_below(const char* op, const char* name, const Indices& indices, int64_t rows, int64_t cols, int64_t slots) {
  int64_t largest = -1;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) largest = std::max(largest, indices(i, j));
  }
  N3_CHECK(op, largest < slots, name, " must be below the number of slots ", slots, ", got ", largest);
}

}  // namespace

Slot Call::slot(int64_t index) {
  const int64_t bytes = problem.state == Element::kFloat ? 4 : problem.state < Element::kInt8 ? 2 : 1;
  float* scale = static_cast<float*>(scale_.data);
  static char no_elements;  // a state without any (d_state 0) has no memory, yet it is not padding
  return {(state_.data ? static_cast<char*>(state_.data) : &no_elements) + index * state_.strides[0] * bytes,
          scale ? scale + index * scale_.strides[0] : nullptr, &layout_,
          uint64_t(index) * problem.heads * problem.head_dim * problem.d_state};
}

void Call::resolve_sources(const char* op, const Params& p) {
  if (p.source.data) check_below(op, "state_indices", p.source, p.batch, std::max<int64_t>(p.source_cols, 1), p.slots);
  if (p.where != Destination::kSource) {
    check_below(op, "dst_state_indices", p.destination, p.batch, p.where == Destination::kEach ? p.tokens : 1, p.slots);
  }
  for (int64_t b = 0; p.num_accepted.data && b < p.batch; ++b) {
    const int64_t accepted = p.num_accepted(b);
    N3_CHECK(op, accepted >= 1 && accepted <= p.source_cols, "num_accepted must be between 1 and ", p.source_cols,
             ", got ", accepted);
  }
  for (int64_t b = 0; p.num_tokens.data && b < p.batch; ++b) {
    const int64_t tokens = p.num_tokens(b);
    N3_CHECK(op, tokens >= 0 && tokens <= p.tokens, "num_tokens must be between 0 and T=", p.tokens, ", got ", tokens);
  }
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t index = p.source(b, p.num_accepted.data ? p.num_accepted(b) - 1 : 0);
    source_slots_[b] = index;
    sequences_[b].source = index < 0 ? Slot{} : slot(index);
    sequences_[b].tokens = p.num_tokens.data ? p.num_tokens(b) : p.tokens;
  }
}

void Call::resolve_parents(const char* op, const Params& p) {
  if (!p.parents.data) return;
  problem.tree = true;
  parents_.resize(p.batch * p.tokens);
  // Token by token, as the reference finds the first wrong one.
  for (int64_t t = 0; t < p.tokens; ++t) {
    for (int64_t b = 0; b < p.batch; ++b) {
      if (source_slots_[b] < 0 || t >= sequences_[b].tokens) continue;
      const int64_t parent = p.parents(b, t);
      N3_CHECK(op, parent >= -1 && parent < t, "parents must be between -1 and t - 1 for token t, got ", parent,
               " for token ", t);
      parents_[b * p.tokens + t] = int32_t(parent);
    }
  }
  for (int64_t b = 0; b < p.batch; ++b) sequences_[b].parents = parents_.data() + b * p.tokens;
}

void Call::resolve_destinations(const Params& p) {
  for (int64_t b = 0; b < p.batch; ++b) {
    sequences_[b].written = written_.data() + b * (p.tokens + 1);
    if (source_slots_[b] < 0) continue;
    const int64_t tokens = sequences_[b].tokens;
    const auto put = [&](int64_t after, int64_t index) {
      if (index < 0) return;
      written_slots_[b * (p.tokens + 1) + after] = index;
      written_[b * (p.tokens + 1) + after] = slot(index);
    };
    switch (p.where) {
      case Destination::kSource: put(tokens, source_slots_[b]); break;
      case Destination::kLast: put(tokens, p.destination(b)); break;
      case Destination::kEach:
        for (int64_t t = 0; t < tokens; ++t) put(t + 1, p.destination(b, t));
        break;
    }
  }
}

// Every state is read before any is written. A sequence reads its rows before it writes them; only what another one
// writes over is copied beforehand.
void Call::copy_endangered_sources(const Params& p) {
  if (p.where == Destination::kSource) return;
  std::vector<std::pair<int64_t, int64_t>> readers;  // slot, sequence
  for (int64_t b = 0; b < p.batch; ++b) {
    if (source_slots_[b] >= 0) readers.emplace_back(source_slots_[b], b);
  }
  std::sort(readers.begin(), readers.end());
  std::vector<char> endangered(p.batch);
  for (int64_t i = 0; i < int64_t(written_slots_.size()); ++i) {
    if (written_slots_[i] < 0) continue;
    auto at = std::lower_bound(readers.begin(), readers.end(), std::pair<int64_t, int64_t>{written_slots_[i], -1});
    for (; at != readers.end() && at->first == written_slots_[i]; ++at) {
      if (at->second != i / (p.tokens + 1)) endangered[at->second] = 1;
    }
  }
  const int64_t rows = p.heads * p.head_dim;
  packed_ = {{p.head_dim * p.d_state, p.d_state, 1}, {p.head_dim, 1}};
  for (int64_t b = 0; b < p.batch; ++b) {
    if (!endangered[b]) continue;
    Slot& source = sequences_[b].source;
    with_element(problem.state, [&](auto t) {
      using T = decltype(t);
      auto& copy = copies_.emplace_back(rows * p.d_state * sizeof(T));
      T* const to = reinterpret_cast<T*>(copy.data());
      const T* const from = static_cast<const T*>(source.data);
      torch::stable::parallel_for(0, rows, 1024, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          const T* const in = from + row / p.head_dim * layout_.state[0] + row % p.head_dim * layout_.state[1];
          for (int64_t n = 0; n < p.d_state; ++n) to[row * p.d_state + n] = in[n * layout_.state[2]];
        }
      });
      source.data = to;
    });
    if (source.scale) {
      auto& scales = scale_copies_.emplace_back(rows);
      for (int64_t row = 0; row < rows; ++row) {
        scales[row] = source.scale[row / p.head_dim * layout_.scale[0] + row % p.head_dim * layout_.scale[1]];
      }
      source.scale = scales.data();
    }
    source.layout = &packed_;
  }
}

Call::Call(const char* op, const Params& p)
    : A_(floats_of(p.A, p.heads)), state_(p.state), scale_(p.state_scale), sequences_(p.batch), source_slots_(p.batch),
      written_slots_(p.batch * (p.tokens + 1), -1), written_(p.batch * (p.tokens + 1)) {
  layout_ = {{state_.strides[1], state_.strides[2], state_.strides[3]}, {scale_.strides[1], scale_.strides[2]}};
  problem = {};
  problem.batch = p.batch, problem.tokens = p.tokens, problem.heads = p.heads, problem.head_dim = p.head_dim;
  problem.groups = p.groups, problem.d_state = p.d_state;
  problem.x = view_of(p.x), problem.z = view_of(p.z), problem.dt = view_of(p.dt);
  problem.B = view_of(p.B), problem.C = view_of(p.C);
  problem.A = A_.data();
  if (p.dt_bias.data) problem.dt_bias = (dt_bias_ = floats_of(p.dt_bias, p.heads)).data();
  problem.D_has_channels = p.D.strides[1] != 0;
  if (p.D.data) problem.D = (D_ = floats_of(p.D, p.heads, problem.D_has_channels ? p.head_dim : 1)).data();
  problem.state = element_of(state_.dtype);
  if (p.stochastic) seed_[0] = p.seed[0], seed_[1] = p.seed[p.seed_stride], problem.seed = seed_;
  problem.dt_softplus = p.dt_softplus, problem.dt_min = p.dt_min, problem.dt_max = p.dt_max;
  const int64_t channels = p.heads * p.head_dim;
  problem.y = {p.y, problem.x.element, {p.tokens * channels, channels, p.head_dim, 1}};
  problem.sequences = sequences_.data();
  resolve_sources(op, p);
  resolve_parents(op, p);
  resolve_destinations(p);
  mamba::WrittenSlots written;
  for (const int64_t slot : written_slots_) written.add(slot);
  written.check(op, p.where == Destination::kSource ? "state_indices" : "dst_state_indices");
  copy_endangered_sources(p);
}

int64_t Call::grain() const {
  constexpr int64_t kThreadWork = 1 << 14;  // elements of states times tokens: some 5 us
  return std::max<int64_t>(1, kThreadWork / std::max<int64_t>(1, kBlock * problem.d_state * problem.tokens));
}

void Call::run(int64_t begin, int64_t end) const {
  const std::unique_ptr<float[]> workspace(new float[workspace_floats(problem)]);
  kernels().update(problem, workspace.get(), begin, end);
}

namespace {

Tensor ssm_update(const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                  const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                  const OptionalTensor& state_indices, const OptionalTensor& dst_state_indices,
                  const OptionalTensor& num_accepted, const OptionalTensor& num_tokens, const OptionalTensor& parents,
                  const OptionalTensor& state_scale, const OptionalTensor& seed, const std::string& rounding,
                  bool dt_softplus, double dt_min, std::optional<double> dt_max) {
  Params p = check(state, x, dt, A, B, C, D, z, dt_bias, state_indices, dst_state_indices, num_accepted, num_tokens,
                   parents, state_scale, seed, rounding, dt_softplus, dt_min, dt_max);
  check_written("ssm_update", "state", state);
  check_written("ssm_update", "state_scale", state_scale);
  const Tensor y = torch::stable::new_empty(x, std::vector<int64_t>(x.sizes().begin(), x.sizes().end()));
  p.y = y.mutable_data_ptr();
  const Call call(op, p);
  torch::stable::parallel_for(0, call.items(), call.grain(), [&](int64_t begin, int64_t end) { call.run(begin, end); });
  return y;
}

}  // namespace
}  // namespace n3::ssm_update

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("ssm_update", TORCH_BOX(&n3::ssm_update::ssm_update)); }
