// The sm_90 kernel of ssd_scan under the emulator, with one C entry for tests/mamba/test_ssd_scan_cuda_kernel.py, which
// describes the tensors as the launcher would.
#include "cuda_emulator.h"
#include "hopper_emulator.h"

#include "mamba/ssd_scan_sm90_kernel.cuh"

namespace emulator {
template <>
float to_float<n3::device::BF16>(uint16_t bits) {
  return n3::bf16_to_float(bits);
}
template <>
float to_float<n3::device::F16>(uint16_t bits) {
  return n3::half_to_float(bits);
}
}  // namespace emulator

namespace {

namespace scan = n3::ssd_scan::sm90;

struct Tensor {  // strides count elements; data null: not given
  void* data;
  int64_t dtype;  // 0 float32, 1 float16, 2 bfloat16, 3 mamba::Saturated; of indices 1: int64
  int64_t strides[4];
};

struct Call {
  int64_t sequences, packed, length, tokens, heads, groups, head_dim, d_state, slots, checkpoints, multiprocessors;
  Tensor x, B, C, z, dt, A, D, dt_bias, initial, final, state_indices, cu_seqlens, has_initial;
  Tensor checkpoint_tokens, checkpoint_indices;
  void* y;
  double dt_min, dt_max;
  int64_t softplus, lazy, reversed;  // lazy: 1 the products, 2 the copies as well
};

scan::View view(const Tensor& t) {
  return {t.data, n3::mamba::Type(t.dtype), {t.strides[0], t.strides[1], t.strides[2], t.strides[3]}};
}
scan::IndexView index(const Tensor& t) { return {t.data, t.dtype == 1, {t.strides[0], 0}}; }

emulator::TensorMap map_of(const Tensor& t, const Call& c, int64_t inner, int64_t middle, int columns) {
  emulator::TensorMap m{static_cast<const char*>(t.data),
                        {inner, middle, c.packed ? c.tokens : c.length, c.packed ? 1 : c.sequences},
                        {2, 2 * t.strides[2], 2 * t.strides[1], 2 * t.strides[0]},
                        {columns, 1, scan::kTokens, 1},
                        2 * columns};
  return m;
}

template <typename T, typename Tile>
void run(const Call& c, const scan::Plan& plan) {
  scan::Problem p{};
  p.work = plan.work;
  p.z = c.z.data;
  for (int i = 0; i < 3; ++i) p.z_strides[i] = c.z.strides[i];
  p.y = c.y;
  p.dt = view(c.dt), p.A = view(c.A), p.D = view(c.D), p.dt_bias = view(c.dt_bias);
  p.initial = view(c.initial), p.final = view(c.final);
  p.state_indices = index(c.state_indices), p.cu_seqlens = index(c.cu_seqlens);
  p.checkpoint_tokens = index(c.checkpoint_tokens), p.checkpoint_indices = index(c.checkpoint_indices);
  p.has_initial = static_cast<const uint8_t*>(c.has_initial.data);
  p.has_initial_stride = c.has_initial.strides[0];
  p.sequences = int32_t(c.sequences), p.length = int32_t(c.length), p.tokens = int32_t(c.tokens);
  p.slots = int32_t(c.slots), p.checkpoints = int32_t(c.checkpoints);
  p.heads = int32_t(c.heads), p.head_dim = int32_t(c.head_dim), p.d_state = int32_t(c.d_state);
  p.dt_min = float(c.dt_min), p.dt_max = float(c.dt_max), p.dt_softplus = c.softplus;
  const emulator::TensorMap x = map_of(c.x, c, c.head_dim, c.heads, Tile::kColumns),
                            b = map_of(c.B, c, c.d_state, c.groups, 64), cc = map_of(c.C, c, c.d_state, c.groups, 64);
  emulator::launch_hopper(plan.blocks, plan.threads, c.reversed,
                          [&] { scan::tensor_scan_kernel_sm90<T, Tile>(x, b, cc, p); });
}

}  // namespace

// Returns the template that was run.
extern "C" int emulate_ssd_scan(const Call* call) {
  const Call& c = *call;
  emulator::lazy_products = c.lazy > 0;
  emulator::lazy_copies = c.lazy > 1;
  const scan::Plan plan =
      scan::plan(c.sequences, c.packed, c.heads, c.groups, c.head_dim, c.d_state, c.multiprocessors);
  scan::with_tile(plan.kernel, [&](auto* type) {
    using Tile = std::remove_pointer_t<decltype(type)>;
    c.x.dtype == 1   ? run<n3::device::F16, Tile>(c, plan)
    : c.x.dtype == 2 ? run<n3::device::BF16, Tile>(c, plan)
                     : run<n3::mamba::Saturated, Tile>(c, plan);
  });
  return int(plan.kernel);
}
