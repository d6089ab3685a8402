#include "quantize_run.cuh"

#include <torch/csrc/stable/library.h>

#include "quantize_launch.cuh"

namespace {

using n3::Tensor;
namespace quantize = n3::nvfp4_quantize;

quantize::Parts nvfp4_quantize(const Tensor& x, const std::optional<Tensor>& global_scale,
                               const std::optional<Tensor>& hadamard, const std::optional<Tensor>& seed,
                               const std::string& rounding, bool four_over_six, const std::string& metric,
                               const std::string& block, bool per_row, const std::string& scale_layout) {
  quantize::Params p =
      quantize::check(x, global_scale, hadamard, seed, rounding, four_over_six, metric, block, per_row, scale_layout);
  const n3::DeviceGuard guard(x.get_device_index());
  const quantize::Readable source = quantize::readable(x, true);
  const Tensor given = quantize::aligned_or(global_scale, x), signs = quantize::aligned_or(hadamard, x);
  const Tensor key = quantize::aligned_or(seed, x);
  if (global_scale) p.global_scale = static_cast<const float*>(given.const_data_ptr());
  if (hadamard) p.signs = static_cast<const float*>(signs.const_data_ptr());
  if (rounding == "stochastic") p.seed = static_cast<const int64_t*>(key.const_data_ptr());
  const quantize::Parts parts = quantize::empty_parts(x, p);
  const quantize::Args args = quantize::args_of(p, source);
  const Tensor memory = quantize::words(x, quantize::words_of(args));
  const quantize::Launcher launcher{quantize::op, n3::current_stream(quantize::op, x)};
  quantize::with_type(x.scalar_type(), [&](auto* type) {
    quantize::run<std::remove_pointer_t<decltype(type)>>(args, quantize::data_of(memory), launcher);
  });
  return parts;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) { m.impl("nvfp4_quantize", TORCH_BOX(&nvfp4_quantize)); }
