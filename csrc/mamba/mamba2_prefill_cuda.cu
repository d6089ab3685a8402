// x, B and C pass from launch to launch as saturated float16, which tensor cores take, in a workspace of [tokens,
// channels]; y passes so too, in its own place.
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../common/launch.h"
#include "conv1d_cuda.h"
#include "mamba2_prefill_kernel.cuh"
#include "mixer.h"
#include "ssd_scan_sm90.h"

#if defined(N3_HAS_SM90)  // else there is no scan
namespace {

using n3::ScalarType;
using n3::Tensor;
namespace conv = n3::causal_conv1d;
namespace mamba = n3::mamba;
namespace mamba2 = n3::mamba2;
namespace norm = n3::gated_norm;
namespace scan = n3::ssd_scan;
using mamba::Operand;
using mamba::OptionalTensor;

// Strides: sequence, token, middle, inner.
Operand columns_of(const Tensor& mixed, const mamba2::PrefillParams& p, int64_t first, int64_t width) {
  const int64_t row = p.mixer.channels;
  char* data = static_cast<char*>(mixed.mutable_data_ptr()) + 2 * first;  // elements of 16 bits
  return {data, ScalarType::Half, {p.conv.length * row, row, width, 1}};
}

mamba2::FinishArgs finish_of(const mamba2::PrefillParams& p, const mamba2::PrefillPlan& plan) {
  const mamba2::Mixer& m = p.mixer;
  mamba2::FinishArgs a{};
  a.norm = {{p.scan.y, mamba::Type::kHalf, {m.inner, 1}}, mamba::view_of(p.z), mamba::view_of(m.norm_weight),
            p.scan.y, p.conv.tokens, plan.groups, m.group_size, m.eps, m.norm_before_gate && m.norm_weight.data};
  a.norm.z.strides[1] = p.z.strides[2];
  a.z_sequence = p.z.strides[0], a.z_token = p.z.strides[1];
  a.conv = conv::args_of(p.conv);
  a.conv.channel_blocks = uint32_t(plan.channel_blocks);
  a.norm_blocks = uint32_t(plan.norm_blocks);
  return a;
}

// y is aligned by itself.
bool in_vectors(const mamba2::PrefillParams& p) {
  const auto aligned = [](const Operand& o, int64_t stride) {
    return !o.data || (stride == 1 && reinterpret_cast<uintptr_t>(o.data) % 16 == 0);
  };
  return p.mixer.group_size % norm::kChunk == 0 && p.z.strides[0] % norm::kChunk == 0 &&
         p.z.strides[1] % norm::kChunk == 0 && aligned(p.z, p.z.strides[2]) &&
         aligned(p.mixer.norm_weight, p.mixer.norm_weight.strides[0]);
}

template <typename T, bool kVectors>
void launch_finish(const mamba2::PrefillParams& p, const mamba2::PrefillPlan& plan, cudaStream_t stream) {
  if (plan.blocks == 0) return;  // a grid of 0 blocks is a launch error
  mamba::check_grid(mamba2::prefill_op, plan.blocks);
  const auto kernel = plan.threads == 32    ? mamba2::finish_kernel<T, 32, kVectors>
                      : plan.threads == 128 ? mamba2::finish_kernel<T, 128, kVectors>
                                            : mamba2::finish_kernel<T, 512, kVectors>;
  n3::launch_overlapping(mamba2::prefill_op, kernel, {plan.blocks, norm::block_threads(plan.threads), 0, 1}, stream,
                         finish_of(p, plan));
}

template <typename T>
void launch_finish(const mamba2::PrefillParams& p, const mamba2::PrefillPlan& plan, cudaStream_t stream) {
  in_vectors(p) ? launch_finish<T, true>(p, plan, stream) : launch_finish<T, false>(p, plan, stream);
}

Tensor mamba2_prefill(const Tensor& zxbcdt, const Tensor& conv_weight, const OptionalTensor& conv_bias,
                      const Tensor& conv_state, const Tensor& ssm_state, const Tensor& state_indices, const Tensor& A,
                      const OptionalTensor& D, const OptionalTensor& dt_bias, const OptionalTensor& norm_weight,
                      const OptionalTensor& has_initial, const OptionalTensor& cu_seqlens,
                      const OptionalTensor& checkpoint_tokens, const OptionalTensor& checkpoint_indices,
                      std::optional<int64_t> group_size, double eps, bool norm_before_gate,
                      const std::optional<std::string>& activation, int64_t chunk_size, bool dt_softplus,
                      double dt_min, std::optional<double> dt_max) {
  mamba2::PrefillParams p = mamba2::check_prefill(
      zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, state_indices, A, D, dt_bias, norm_weight, has_initial,
      cu_seqlens, checkpoint_tokens, checkpoint_indices, group_size, eps, norm_before_gate, activation, chunk_size,
      dt_softplus, dt_min, dt_max);
  const mamba2::Mixer& m = p.mixer;
  N3_CHECK(mamba2::prefill_op, zxbcdt.scalar_type() != ScalarType::Float,
           "the CUDA kernel takes float16 and bfloat16 zxbcdt, got float32: tensor cores would round it");
  p.scan.x.dtype = ScalarType::Half;
  const char* reason = scan::unsupported(p.scan);
  N3_CHECK(mamba2::prefill_op, !reason, "the CUDA kernel ", reason);
  const n3::DeviceGuard guard(zxbcdt.get_device_index());
  const cudaStream_t stream = n3::current_stream(mamba2::prefill_op, zxbcdt);

  std::vector<int64_t> shape(zxbcdt.sizes().begin(), zxbcdt.sizes().end());
  shape.back() = m.inner;
  const Tensor y = torch::stable::new_empty(zxbcdt, shape);
  const Tensor mixed = torch::stable::new_empty(zxbcdt, std::vector<int64_t>{p.conv.tokens * m.channels});
  p.conv.y = mixed.mutable_data_ptr();
  p.scan.x = columns_of(mixed, p, 0, m.head_dim);
  p.scan.B = columns_of(mixed, p, m.inner, m.d_state);
  p.scan.C = columns_of(mixed, p, m.inner + m.groups * m.d_state, m.d_state);
  p.scan.y = y.mutable_data_ptr();
  const mamba2::PrefillPlan plan =
      mamba2::prefill_plan({p.conv.tokens, p.conv.sequences, m.inner, m.channels, m.kept, m.group_size});
  N3_CHECK(mamba2::prefill_op, p.conv.tokens * plan.groups < norm::kMostGroups,
           "the CUDA kernel takes fewer than 2^32 groups");

  conv::launch_mixed(mamba2::prefill_op, p.conv, stream);
  scan::launch_mixed(mamba2::prefill_op, p.scan, zxbcdt.get_device_index(), stream);
  zxbcdt.scalar_type() == ScalarType::Half ? launch_finish<mamba::F16>(p, plan, stream)
                                           : launch_finish<mamba::BF16>(p, plan, stream);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("mamba2_prefill", TORCH_BOX(&mamba2_prefill)); }
#endif
