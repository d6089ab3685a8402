#include "ssd_scan.h"

#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/library.h>

#include "../common/tensor_map.h"
#include "operands_cuda.h"
#include "ssd_scan_sm90_kernel.cuh"

namespace {

using n3::DeviceGuard;
using n3::ScalarType;
using n3::Tensor;
using n3::mamba::Operand;
using n3::mamba::OptionalTensor;
namespace scan = n3::ssd_scan;
namespace sm90 = n3::ssd_scan::sm90;

static_assert(scan::kChunk == sm90::kTokens);

// What the copy engine reads: rows of 16 bytes that begin at multiples of 16 bytes. Of a dimension of size 1 the stride
// does not matter; a stride of 0, of an expanded tensor, is not tried.
bool in_rows(const Operand& o, const int64_t (&sizes)[3]) {
  if (!o.data) return true;
  bool fit = o.strides[3] == 1 && reinterpret_cast<uintptr_t>(o.data) % 16 == 0;
  for (int i = 0; i < 3; ++i) fit = fit && (sizes[i] <= 1 || (o.strides[i] % 8 == 0 && o.strides[i] > 0));
  return fit;
}

// Why this kernel does not take a call, or null; tensor_core_scan in n3kernels/mamba/_supports.py asks first, in the
// same words.
const char* unsupported(const scan::Params& p) {
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

// [sequences, tokens, middle, inner] in boxes of 64 tokens and `columns` of the inner dimension.
CUtensorMap map_of(const Operand& o, int64_t inner, int64_t middle, int64_t tokens, int64_t sequences, int columns) {
  return n3::tensor_map(scan::op, o.dtype, o.data, {inner, middle, tokens, sequences},
                        {o.strides[2], o.strides[1], o.strides[0]}, {columns, 1, sm90::kTokens, 1});
}

sm90::Problem problem_of(const scan::Params& p, const sm90::Work& work) {
  sm90::Problem q{};
  q.work = work;
  q.z = p.z.data;
  for (int i = 0; i < 3; ++i) q.z_strides[i] = p.z.strides[i];
  q.y = p.y;
  q.dt = n3::mamba::view_of(p.dt), q.A = n3::mamba::view_of(p.A), q.D = n3::mamba::view_of(p.D);
  q.dt_bias = n3::mamba::view_of(p.dt_bias);
  q.initial = n3::mamba::view_of(p.initial), q.final = n3::mamba::view_of(p.final);
  q.state_indices = n3::mamba::view_of(p.state_indices), q.cu_seqlens = n3::mamba::view_of(p.cu_seqlens);
  q.checkpoint_tokens = n3::mamba::view_of(p.checkpoint_tokens);
  q.checkpoint_indices = n3::mamba::view_of(p.checkpoint_indices);
  q.has_initial = static_cast<const uint8_t*>(p.has_initial.data), q.has_initial_stride = p.has_initial.strides[0];
  q.sequences = int32_t(p.sequences), q.length = int32_t(p.length), q.tokens = int32_t(p.tokens);
  q.slots = int32_t(p.slots ? p.slots : p.sequences), q.checkpoints = int32_t(p.checkpoints);
  q.heads = int32_t(p.heads), q.head_dim = int32_t(p.head_dim), q.d_state = int32_t(p.d_state);
  q.dt_min = p.dt_min, q.dt_max = p.dt_max, q.dt_softplus = p.dt_softplus;
  return q;
}

// The attribute first: it gives a new thread the device's context, without which the driver may make no maps.
template <typename T, typename Tile>
void launch(const scan::Params& p, const sm90::Plan& plan, cudaStream_t stream) {
  const auto kernel = sm90::tensor_scan_kernel_sm90<T, Tile>;
  N3_CUDA_CHECK(scan::op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared));
  const int64_t tokens = p.cu_seqlens.data ? p.tokens : p.length, batch = p.cu_seqlens.data ? 1 : p.sequences;
  CUtensorMap x{}, b{}, c{};
  if (p.tokens) {  // else nobody loads
    x = map_of(p.x, p.head_dim, p.heads, tokens, batch, Tile::kColumns);
    b = map_of(p.B, p.d_state, p.groups, tokens, batch, 64);
    c = map_of(p.C, p.d_state, p.groups, tokens, batch, 64);
  }
  kernel<<<plan.blocks, plan.threads, plan.shared, stream>>>(x, b, c, problem_of(p, plan.work));
  N3_CUDA_CHECK(scan::op, cudaGetLastError());
}

void run(const scan::Params& p, const Tensor& x) {
  const char* reason = unsupported(p);
  N3_CHECK(scan::op, !reason, "the CUDA kernel ", reason);
  if (p.heads == 0) return;
  int sms;
  N3_CUDA_CHECK(scan::op, cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, x.get_device_index()));
  const bool packed = p.cu_seqlens.data;
  const sm90::Plan plan = sm90::plan(p.sequences, packed, p.heads, p.groups, p.head_dim, p.d_state, sms);
  N3_CHECK(scan::op, plan.work.items <= sm90::kMostItems, "sequences times heads must be at most 2^30");
  if (plan.blocks == 0) return;  // a grid of 0 blocks is a launch error
  const cudaStream_t stream = n3::current_stream(scan::op, x);
  sm90::with_tile(plan.kernel, [&](auto* type) {
    using Tile = std::remove_pointer_t<decltype(type)>;
    p.x.dtype == ScalarType::Half ? launch<n3::device::F16, Tile>(p, plan, stream)
                                  : launch<n3::device::BF16, Tile>(p, plan, stream);
  });
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
