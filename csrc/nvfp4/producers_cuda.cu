#include "producers.h"

#include <torch/csrc/stable/library.h>

#include "producers_run.cuh"
#include "quantize_launch.cuh"

namespace {

using n3::ScalarType;
using n3::Tensor;
namespace producers = n3::nvfp4_producers;
namespace quantize = n3::nvfp4_quantize;
using producers::NormArgs;
using quantize::Args;
using quantize::Parts;

template <typename Source>
Parts activation(const char* op, int64_t factor, const Tensor& x, const std::optional<Tensor>& global_scale,
                 bool four_over_six, const std::string& metric, bool per_row, const std::string& scale_layout) {
  quantize::Params p =
      producers::check_activation(op, factor, x, global_scale, four_over_six, metric, per_row, scale_layout);
  const n3::DeviceGuard guard(x.get_device_index());
  const quantize::Readable source = quantize::readable(x, false);
  const Tensor given = quantize::aligned_or(global_scale, x);
  if (global_scale) p.global_scale = static_cast<const float*>(given.const_data_ptr());
  const Parts parts = quantize::empty_parts(x, p);
  const Args args = quantize::args_of(p, source);
  const Tensor memory = quantize::words(x, producers::words_of(args, false));
  const quantize::Launcher launcher{op, n3::current_stream(op, x)};
  quantize::with_type(x.scalar_type(), [&](auto* type) {
    producers::run_activation<std::remove_pointer_t<decltype(type)>, Source>(args, quantize::data_of(memory), launcher);
  });
  return parts;
}

Parts relu2_nvfp4_quantize(const Tensor& x, const std::optional<Tensor>& global_scale, bool four_over_six,
                           const std::string& metric, bool per_row, const std::string& scale_layout) {
  return activation<producers::Relu2>(producers::relu2_op, 1, x, global_scale, four_over_six, metric, per_row,
                                      scale_layout);
}

Parts silu_mul_nvfp4_quantize(const Tensor& x, const std::optional<Tensor>& global_scale, bool four_over_six,
                              const std::string& metric, bool per_row, const std::string& scale_layout) {
  return activation<producers::SiluMul>(producers::silu_mul_op, 2, x, global_scale, four_over_six, metric, per_row,
                                        scale_layout);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> rms_norm_nvfp4_quantize(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& global_scale, double eps, bool four_over_six, const std::string& metric, bool per_row,
    const std::string& scale_layout, bool keep) {
  quantize::Params p = producers::check_rms_norm(x, weight, residual, global_scale, eps, four_over_six, metric, per_row,
                                                 scale_layout);
  const n3::DeviceGuard guard(x.get_device_index());
  const quantize::Readable source = quantize::readable(x, false);
  const quantize::Readable added = residual ? quantize::readable(*residual, false) : source;
  const Tensor given = quantize::aligned_or(global_scale, x), scales = n3::aligned(weight);
  if (global_scale) p.global_scale = static_cast<const float*>(given.const_data_ptr());
  const auto [q, block_scale, global_out] = quantize::empty_parts(x, p);
  const std::vector<int64_t> nothing{0}, shape(x.sizes().begin(), x.sizes().end());
  const Tensor y = torch::stable::new_empty(x, keep ? shape : nothing, x.scalar_type());
  const Tensor total = torch::stable::new_empty(x, residual ? shape : nothing,
                                                residual ? residual->scalar_type() : x.scalar_type());

  const Args args = quantize::args_of(p, source);
  const Tensor memory = quantize::words(x, producers::words_of(args, true));
  NormArgs n{};
  if (residual) {
    n.residual = quantize::rows_of(added);
    n.residual_out = total.mutable_data_ptr();
    n.wide_residual = residual->scalar_type() == ScalarType::Float;
  }
  n.weight = scales.const_data_ptr();
  n.wide_weight = weight.scalar_type() == ScalarType::Float;
  n.y = keep ? y.mutable_data_ptr() : nullptr;
  n.eps = eps;
  const quantize::Launcher launcher{producers::rms_norm_op, n3::current_stream(producers::rms_norm_op, x)};
  quantize::with_type(x.scalar_type(), [&](auto* type) {
    producers::run_norm<std::remove_pointer_t<decltype(type)>>(args, n, quantize::data_of(memory), launcher);
  });
  return {q, block_scale, global_out, y, total};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) {
  m.impl("relu2_nvfp4_quantize", TORCH_BOX(&relu2_nvfp4_quantize));
  m.impl("silu_mul_nvfp4_quantize", TORCH_BOX(&silu_mul_nvfp4_quantize));
  m.impl("rms_norm_nvfp4_quantize", TORCH_BOX(&rms_norm_nvfp4_quantize));
}
