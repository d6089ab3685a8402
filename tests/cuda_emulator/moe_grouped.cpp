// The sm_90 kernel of grouped_linear under the emulator, with one C entry for tests/moe/test_grouped_cuda_kernel.py,
// which describes the tensors as the launcher would.
#include "cuda_emulator.h"
#include "hopper_emulator.h"

#include "moe/grouped_linear_sm90_kernel.cuh"

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

namespace sm90 = n3::grouped_linear::sm90;

struct Call {
  int64_t m, rows, groups, n, k, multiprocessors;
  const void *x, *w;
  int64_t strides[2];  // of group and row of w, in elements
  const int32_t *offsets, *gather;
  const float* row_scale;
  void* y;
  int64_t half, relu2, lazy, reversed;  // half: float16; lazy: 1 the products, 2 the copies of tiles as well
};

}  // namespace

extern "C" void emulate_grouped_linear(const Call* call) {
  const Call& c = *call;
  emulator::lazy_products = c.lazy > 0;
  emulator::lazy_copies = c.lazy > 1;
  const sm90::Plan plan = sm90::plan(c.rows, c.groups, c.n, c.multiprocessors);
  const emulator::TensorMap map{static_cast<const char*>(c.w),
                                {c.k, c.n, c.groups, 1},
                                {2, 2 * c.strides[1], 2 * c.strides[0], 2 * c.strides[0]},
                                {64, 64, 1, 1},
                                128};
  const sm90::Problem p{plan.work,      c.x,          c.offsets,  c.gather,   c.row_scale,    c.y,
                        int32_t(c.m), int32_t(c.rows), int32_t(c.n), int32_t(c.k), c.relu2 != 0};
  emulator::launch_hopper(plan.blocks, sm90::items::kThreads, c.reversed, [&] {
    c.half ? sm90::tensor_grouped_kernel_sm90<n3::device::F16>(map, p)
           : sm90::tensor_grouped_kernel_sm90<n3::device::BF16>(map, p);
  });
}
