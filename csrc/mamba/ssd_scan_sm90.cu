#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "ssd_scan_sm90_launch.cuh"

namespace n3::ssd_scan {
namespace {

// What the copy engine reads: rows of 16 bytes that begin at multiples of 16 bytes. Of a dimension of size 1 the stride
// does not matter; a stride of 0, of an expanded tensor, is not tried.
bool in_rows(const Operand& o, const int64_t (&sizes)[3]) {
  if (!o.data) return true;
  bool fit = o.strides[3] == 1 && reinterpret_cast<uintptr_t>(o.data) % 16 == 0;
  for (int i = 0; i < 3; ++i) fit = fit && (sizes[i] <= 1 || (o.strides[i] % 8 == 0 && o.strides[i] > 0));
  return fit;
}

}  // namespace

const char* unsupported(const Params& p) {
  if (p.x.dtype == ScalarType::Float) return "takes float16 and bfloat16 x, got float32: tensor cores would round it";
  if (p.head_dim < 8 || p.head_dim % 8) return "takes a head_dim that is a positive multiple of 8";
  if (p.d_state < 16 || p.d_state > 256 || p.d_state % 16) return "takes a d_state of 16 to 256, a multiple of 16";
  if (p.tokens >= int64_t(1) << 31) return "takes fewer than 2^31 tokens";
  const bool packed = p.cu_seqlens.data;
  const int64_t batch = packed ? 1 : p.sequences, tokens = packed ? p.tokens : p.length;
  const int64_t heads[3] = {batch, tokens, p.heads}, groups[3] = {batch, tokens, p.groups};
  if (p.tokens && !(in_rows(p.x, heads) && in_rows(p.z, heads) && in_rows(p.B, groups) && in_rows(p.C, groups))) {
    return "takes x, B, C and z whose rows are contiguous and begin at multiples of 16 bytes";
  }
  return nullptr;
}

}  // namespace n3::ssd_scan

namespace {

using n3::DeviceGuard;
using n3::ScalarType;
using n3::Tensor;
using n3::mamba::OptionalTensor;
namespace scan = n3::ssd_scan;

void run(const scan::Params& p, const Tensor& x) {
  const char* reason = scan::unsupported(p);
  N3_CHECK(scan::op, !reason, "the CUDA kernel ", reason);
  const auto launch = p.x.dtype == ScalarType::Half ? scan::launch<n3::device::F16> : scan::launch<n3::device::BF16>;
  launch(scan::op, p, false, x.get_device_index(), n3::current_stream(scan::op, x));
}

std::tuple<Tensor, Tensor> ssd_scan(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                                    const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                                    const OptionalTensor& dt_bias, const OptionalTensor& initial_states,
                                    const OptionalTensor& cu_seqlens, int64_t chunk_size, bool dt_softplus,
                                    double dt_min, std::optional<double> dt_max) {
  scan::Params p = scan::check(x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, chunk_size, dt_softplus,
                               dt_min, dt_max);
  const DeviceGuard guard(x.get_device_index());
  const Tensor y = torch::stable::new_empty(x, x.sizes());
  const Tensor final_states = torch::stable::new_empty(
      x, std::vector<int64_t>{p.sequences, p.heads, p.head_dim, p.d_state}, ScalarType::Float);
  p.y = y.mutable_data_ptr();
  p.final = n3::mamba::operand_of(final_states);
  run(p, x);
  return {y, final_states};
}

Tensor ssd_scan_slots(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                      const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                      const Tensor& state, const Tensor& state_indices, const OptionalTensor& has_initial,
                      const OptionalTensor& cu_seqlens, const OptionalTensor& checkpoint_tokens,
                      const OptionalTensor& checkpoint_indices, int64_t chunk_size, bool dt_softplus, double dt_min,
                      std::optional<double> dt_max) {
  scan::Params p = scan::check_slots(x, dt, A, B, C, D, z, dt_bias, state, state_indices, has_initial, cu_seqlens,
                                     checkpoint_tokens, checkpoint_indices, chunk_size, dt_softplus, dt_min, dt_max);
  const DeviceGuard guard(x.get_device_index());
  const Tensor y = torch::stable::new_empty(x, x.sizes());
  p.y = y.mutable_data_ptr();
  run(p, x);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CUDA, m) {
  m.impl("ssd_scan", TORCH_BOX(&ssd_scan));
  m.impl("ssd_scan.slots", TORCH_BOX(&ssd_scan_slots));
}
