// The fused decoding step: the parts' own kernels with float32 between them, so that float32 inputs give the bits of
// the composition. What passes between them, some 2 % of a state's bytes, stays in the cache.
#include <algorithm>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/element.h"
#include "../common/written.h"
#include "conv1d_engine.h"
#include "gated_norm_kernels.h"
#include "mixer.h"
#include "ssm_update_call.h"

namespace n3::mamba2 {
namespace {

constexpr int64_t kGrain = 1 << 14;  // elements normalised by a thread at least: some 10 us

Operand floats(float* data, int64_t tokens, int64_t row, int64_t outer, int64_t inner) {
  return {data, ScalarType::Float, {tokens * row, row, outer, inner}};
}

// Normalises rows of y [B * T, H * P] into `out`; rows of padding are zeros.
void normalise(const DecodeParams& p, const ssm_update::Problem& ssm, const float* y, void* out) {
  const Mixer& m = p.mixer;
  const int64_t size = element_size(p.z.dtype), groups = m.inner / std::max<int64_t>(m.group_size, 1);
  const std::vector<float> weight = ssm_update::floats_of(m.norm_weight, m.inner);
  const auto forward = gated_norm::kernels().forward_from_float[element_of(p.z.dtype)];
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, m.group_size));
  torch::stable::parallel_for(0, ssm.batch * ssm.tokens * groups, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(gated_norm::scratch_floats(m.group_size));
    std::vector<char> gate(p.z.strides[2] == 1 ? 0 : m.group_size * size);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / groups, at = i % groups * m.group_size;
      const int64_t b = row / ssm.tokens, t = row % ssm.tokens;
      char* const to = static_cast<char*>(out) + (row * m.inner + at) * size;
      const ssm_update::Sequence& q = ssm.sequences[b];
      if (!q.source.data || t >= q.tokens) {
        std::memset(to, 0, m.group_size * size);
        continue;
      }
      const int64_t step = p.z.strides[2];
      const char* z = static_cast<const char*>(p.z.data) +
                      (b * p.z.strides[0] + t * p.z.strides[1] + at * step) * size;
      for (int64_t c = 0; c < int64_t(gate.size()) / size; ++c) {
        std::memcpy(gate.data() + c * size, z + c * step * size, size);
      }
      forward({y + row * m.inner + at, gate.empty() ? z : gate.data(), weight.data() + at, to, scratch.data(), 1,
               m.group_size, m.eps, m.norm_before_gate});
    }
  });
}

Tensor decode(const Tensor& zxbcdt, const Tensor& conv_weight, const OptionalTensor& conv_bias, Tensor conv_state,
              Tensor ssm_state, const Tensor& A, const OptionalTensor& D, const OptionalTensor& dt_bias,
              const OptionalTensor& norm_weight, const OptionalTensor& state_indices,
              const OptionalTensor& dst_state_indices, const OptionalTensor& num_accepted,
              const OptionalTensor& num_tokens, const OptionalTensor& parents, const OptionalTensor& state_scale,
              const OptionalTensor& seed, const std::string& rounding, std::optional<int64_t> group_size, double eps,
              bool norm_before_gate, const std::optional<std::string>& activation, bool dt_softplus, double dt_min,
              std::optional<double> dt_max) {
  DecodeParams p = check_decode(zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, A, D, dt_bias, norm_weight,
                                state_indices, dst_state_indices, num_accepted, num_tokens, parents, state_scale, seed,
                                rounding, group_size, eps, norm_before_gate, activation, dt_softplus, dt_min, dt_max);
  check_written(decode_op, "conv_state", conv_state);
  check_written(decode_op, "ssm_state", ssm_state);
  check_written(decode_op, "state_scale", state_scale);
  const Mixer& m = p.mixer;
  ssm_update::Params& s = p.ssm;
  std::vector<int64_t> shape(zxbcdt.sizes().begin(), zxbcdt.sizes().end());
  shape.back() = m.inner;
  const Tensor out = torch::stable::new_empty(zxbcdt, shape);
  const int64_t rows = s.batch * s.tokens;
  const Tensor xbc = torch::stable::new_empty(zxbcdt, {rows, m.channels}, ScalarType::Float);
  float* const x = static_cast<float*>(xbc.mutable_data_ptr());
  const int64_t width = m.groups * m.d_state;
  p.conv.y = x;
  s.x = floats(x, s.tokens, m.channels, m.head_dim, 1);
  s.B = floats(x + m.inner, s.tokens, m.channels, m.d_state, 1);
  s.C = floats(x + m.inner + width, s.tokens, m.channels, m.d_state, 1);
  // Without a norm the update itself gates, and rounds to the output.
  const bool norm = norm_weight.has_value();
  const Tensor y = torch::stable::new_empty(zxbcdt, {norm ? rows : 0, m.inner}, ScalarType::Float);
  s.y = norm ? y.mutable_data_ptr() : out.mutable_data_ptr();
  if (!norm) {
    s.z = p.z;
    s.z.strides[2] = m.head_dim * p.z.strides[2], s.z.strides[3] = p.z.strides[2];
  }
  ssm_update::Call update(decode_op, s);  // which checks the values of all indices and copies what is in danger
  if (!norm) update.problem.y.element = ssm_update::element_of(zxbcdt.scalar_type());
  causal_conv1d::run_update(p.conv, true);
  torch::stable::parallel_for(0, update.items(), update.grain(),
                              [&](int64_t begin, int64_t end) { update.run(begin, end); });
  if (norm) normalise(p, update.problem, static_cast<const float*>(y.const_data_ptr()), out.mutable_data_ptr());
  return out;
}

}  // namespace
}  // namespace n3::mamba2

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("mamba2_decode", TORCH_BOX(&n3::mamba2::decode)); }
