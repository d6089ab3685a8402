#include <vector>

#include <torch/csrc/stable/library.h>

#include "conv1d_update_cuda.h"
#include "mamba2_decode_kernel.cuh"
#include "mixer.h"
#include "ssm_update_cuda.h"

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace conv = n3::causal_conv1d;
namespace mamba = n3::mamba;
namespace mamba2 = n3::mamba2;
namespace update = n3::ssm_update;
using mamba::OptionalTensor;

template <typename State, typename RowT>
void launch_rows(const mamba2::DecodeArgs& a, const mamba2::DecodePlan& plan, cudaStream_t stream) {
  const auto kernel = mamba2::decode_kernel<State, RowT>;
  N3_CUDA_CHECK(mamba2::decode_op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                        int(mamba2::kDecodeShared)));
  mamba::check_grid(mamba2::decode_op, plan.blocks);
  kernel<<<uint32_t(plan.blocks), mamba2::kDecodeThreads, size_t(plan.shared_bytes), stream>>>(a);
  N3_CUDA_CHECK(mamba2::decode_op, cudaGetLastError());
}

// One launch where the plan says so, else three, between which float32 passes through memory.
template <typename State>
void launch(mamba2::DecodeArgs& a, const mamba2::DecodePlan& plan, const Tensor& like, cudaStream_t stream) {
  if (plan.fused) {
    return plan.width == 128 ? launch_rows<State, mamba::Row<8, 4, true>>(a, plan, stream)
                             : launch_rows<State, mamba::Row<16, 4, true>>(a, plan, stream);
  }
  update::Args& s = a.ssm;
  const int64_t rows = s.slots.batch * s.slots.tokens, channels = a.conv.taps.channels, inner = s.heads * s.head_dim;
  const auto scratch = [&](int64_t columns) {
    return torch::stable::new_empty(like, std::vector<int64_t>{rows * columns}, ScalarType::Float);
  };
  const Tensor xbc = scratch(channels), y = scratch(inner);
  float* const mixed = static_cast<float*>(xbc.mutable_data_ptr());
  float* const u = static_cast<float*>(y.mutable_data_ptr());
  const auto columns = [&](float* data, int64_t last) {
    return mamba::View{data, mamba::Type::kFloat, {s.slots.tokens * channels, channels, last, 1}};
  };
  a.conv.y = mamba::contiguous_view(mixed, ScalarType::Float, s.slots.tokens, channels);
  conv::launch_update(mamba2::decode_op, a.conv, stream);
  s.x = columns(mixed, s.head_dim);
  s.B = columns(mixed + inner, s.d_state);
  s.C = columns(mixed + inner + a.groups * s.d_state, s.d_state);
  s.y = mamba::contiguous_view(u, ScalarType::Float, s.slots.tokens, s.heads, s.head_dim);
  update::launch(mamba2::decode_op, s, stream);
  const int64_t groups = inner / a.norm.group_size;
  mamba::check_grid(mamba2::decode_op, rows * groups);
  mamba2::finish_kernel<mamba2::kDecodeThreads>
      <<<uint32_t(rows * groups), mamba2::kDecodeThreads, 0, stream>>>(a.norm, s.slots, u, groups);
  N3_CUDA_CHECK(mamba2::decode_op, cudaGetLastError());
}

Tensor mamba2_decode(const Tensor& zxbcdt, const Tensor& conv_weight, const OptionalTensor& conv_bias,
                     const Tensor& conv_state, const Tensor& ssm_state, const Tensor& A, const OptionalTensor& D,
                     const OptionalTensor& dt_bias, const OptionalTensor& norm_weight,
                     const OptionalTensor& state_indices, const OptionalTensor& dst_state_indices,
                     const OptionalTensor& num_accepted, const OptionalTensor& num_tokens,
                     const OptionalTensor& parents, const OptionalTensor& state_scale, const OptionalTensor& seed,
                     const std::string& rounding, std::optional<int64_t> group_size, double eps, bool norm_before_gate,
                     const std::optional<std::string>& activation, bool dt_softplus, double dt_min,
                     std::optional<double> dt_max) {
  const mamba2::DecodeParams p = mamba2::check_decode(
      zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, A, D, dt_bias, norm_weight, state_indices,
      dst_state_indices, num_accepted, num_tokens, parents, state_scale, seed, rounding, group_size, eps,
      norm_before_gate, activation, dt_softplus, dt_min, dt_max);
  const mamba2::Mixer& m = p.mixer;
  update::check_covered(mamba2::decode_op, "ssm_state", m.d_state);
  const n3::DeviceGuard guard(zxbcdt.get_device_index());
  const cudaStream_t stream = n3::current_stream(mamba2::decode_op, zxbcdt);
  std::vector<int64_t> shape(zxbcdt.sizes().begin(), zxbcdt.sizes().end());
  shape.back() = m.inner;
  const Tensor y = torch::stable::new_empty(zxbcdt, shape, zxbcdt.scalar_type());
  if (y.numel() == 0 && p.ssm.batch == 0) return y;

  mamba2::DecodeArgs a{};
  a.conv = conv::args_of(p.conv);
  a.ssm = update::args_of(p.ssm);
  a.norm = {mamba::view_of(p.z),
            mamba::contiguous_view(y.mutable_data_ptr(), zxbcdt.scalar_type(), p.ssm.tokens, m.inner),
            mamba::view_of(m.norm_weight), m.group_size, m.eps, m.norm_before_gate};
  a.groups = m.groups;
  const int32_t bytes = update::state_bytes(ssm_state.scalar_type());
  const int32_t conv_bytes = zxbcdt.scalar_type() == ScalarType::Float ? 4 : 2;
  std::vector<mamba::Source> sources{mamba::source_of(p.conv.state, m.channels, m.kept, 1, conv_bytes),
                                     mamba::source_of(p.ssm.state, m.heads, m.head_dim, m.d_state, bytes)};
  if (state_scale) sources.push_back(mamba::source_of(p.ssm.state_scale, m.heads, m.head_dim, 1, 4));
  const mamba::Copies copies = mamba::stage(mamba2::decode_op, a.ssm.slots, sources, zxbcdt, stream);
  a.conv.states = copies[0], a.ssm.states = copies[1], a.ssm.scales = copies[2];
  const mamba2::DecodePlan plan =
      mamba2::decode_plan({p.ssm.batch, p.ssm.tokens, m.heads, m.groups, m.head_dim, m.d_state, m.group_size,
                           a.ssm.vectors, parents.has_value()});
  switch (ssm_state.scalar_type()) {  // check_decode() let nothing else through
    case ScalarType::Float: launch<float>(a, plan, zxbcdt, stream); break;
    case ScalarType::Half: launch<mamba::F16>(a, plan, zxbcdt, stream); break;
    case ScalarType::BFloat16: launch<mamba::BF16>(a, plan, zxbcdt, stream); break;
    case ScalarType::Char: launch<int8_t>(a, plan, zxbcdt, stream); break;
    default: launch<mamba::E4m3>(a, plan, zxbcdt, stream);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("mamba2_decode", TORCH_BOX(&mamba2_decode)); }
