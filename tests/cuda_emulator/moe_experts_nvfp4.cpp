// The kernel of moe_experts with NVFP4 weights on sm_90a under the emulator, with one C entry for
// tests/moe/test_experts_nvfp4_cuda_kernels.py, which sorts the slots and describes the tensors as the launcher would.
#include "cuda_emulator.h"
#include "hopper_emulator.h"

#include "moe/experts_combine_kernel.cuh"
#include "moe/experts_nvfp4_sm90_kernel.cuh"

namespace emulator {
template <>
float to_float<n3::device::BF16>(uint16_t bits) {
  return n3::bf16_to_float(bits);
}
}  // namespace emulator

namespace {

namespace moe = n3::moe_experts;
namespace sm90 = n3::moe_experts::sm90;
namespace nvfp4 = n3::moe_experts::sm90::nvfp4;

struct Weights {
  const void *codes, *scales;
  const float* global;
  int64_t code_strides[2], scale_strides[2];  // of expert and row, in bytes
};

struct Call {
  int64_t tokens, top_k, experts, width, inner, multiprocessors;
  const void* x;
  Weights up, down;
  const int32_t *ids, *order, *offsets;
  const float* weights;
  float* rows;
  void* y;
  int64_t lazy, reversed, merged;  // lazy: 1 the products, 2 the copies as well; merged: as if rows were too many
};

emulator::TensorMap map_of(const Weights& w, int64_t columns, int64_t rows, int64_t experts) {
  const int64_t pitch = w.code_strides[1] / 2;
  return {static_cast<const char*>(w.codes),
          {pitch + columns / 4, rows / 2, experts, 1},
          {2, 4 * pitch, w.code_strides[0], w.code_strides[0]},
          {32, 32, 1, 1},
          64};
}

nvfp4::Scales scales_of(const Weights& w) {
  return {static_cast<const uint8_t*>(w.scales), w.scale_strides[0], w.scale_strides[1], w.global};
}

}  // namespace

// Returns the number of rows that the plan has.
extern "C" int64_t emulate_moe_experts_nvfp4(const Call* call) {
  const Call& c = *call;
  emulator::lazy_products = c.lazy > 0;
  emulator::lazy_copies = c.lazy > 1;
  sm90::Plan plan = nvfp4::plan(c.tokens, c.top_k, c.experts, c.width, c.inner, c.multiprocessors);
  if (c.merged) plan.work.split = 0;
  const emulator::TensorMap up = map_of(c.up, c.width, c.inner, c.experts),
                            down = map_of(c.down, c.inner, c.width, c.experts);
  const nvfp4::Problem p{plan.work,
                         static_cast<const n3::device::BF16*>(c.x),
                         c.order,
                         c.offsets,
                         c.rows,
                         scales_of(c.up),
                         scales_of(c.down),
                         int32_t(c.up.code_strides[1] / 2),
                         int32_t(c.down.code_strides[1] / 2),
                         int32_t(c.width),
                         int32_t(c.inner),
                         int32_t(c.top_k)};
  sm90::with_tile(plan.kernel, [&](auto* type) {
    using Tile = std::remove_pointer_t<decltype(type)>;
    emulator::launch_hopper(plan.blocks, sm90::kThreads, c.reversed,
                            [&] { nvfp4::tensor_experts_nvfp4_kernel_sm90<Tile>(up, down, p); });
  });
  const moe::Combine combine{c.rows,
                             c.weights,
                             c.ids,
                             static_cast<n3::device::BF16*>(c.y),
                             int32_t(c.top_k),
                             sm90::rows_per_slot(plan.work),
                             int32_t(c.width),
                             0,
                             int32_t(c.experts)};
  emulator::launch(plan.combine_blocks, 32 * sm90::kCombineWarps, c.reversed, [&] { moe::combine_kernel(combine); });
  return c.tokens * c.top_k * sm90::rows_per_slot(plan.work);
}
