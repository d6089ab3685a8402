// The kernels of moe_experts on sm_90 under the emulator, with one C entry for tests/moe/test_experts_cuda_kernels.py,
// which sorts the slots and describes the tensors as the launcher would.
#include "cuda_emulator.h"
#include "hopper_emulator.h"

#include "moe/experts_combine_kernel.cuh"
#include "moe/experts_sm90_kernel.cuh"

namespace emulator {
template <>
float to_float<n3::device::BF16>(uint16_t bits) {
  return n3::bf16_to_float(bits);
}
}  // namespace emulator

namespace {

namespace moe = n3::moe_experts;
namespace sm90 = n3::moe_experts::sm90;

struct Call {
  int64_t tokens, top_k, experts, width, inner, first_expert, multiprocessors;
  const void *x, *w_up, *w_down;
  int64_t up_strides[2], down_strides[2];  // of expert and row, in elements
  const int32_t *ids, *order, *offsets, *valid_tokens;
  int32_t* valid_ids;  // where valid_tokens is given
  const float* weights;
  float* rows;
  void* y;
  int64_t lazy, reversed, merged;  // lazy: 1 the products, 2 the copies as well; merged: as if rows were too many
  int64_t activation;              // relu2, silu, gelu
};

emulator::TensorMap map_of(const void* w, int64_t inner, int64_t rows, int64_t experts, const int64_t (&strides)[2]) {
  return {static_cast<const char*>(w),
          {inner, rows, experts, 1},
          {2, 2 * strides[1], 2 * strides[0], 2 * strides[0]},
          {64, 64, 1, 1},
          128};
}

}  // namespace

// ids with -1 in padding rows, on which the test then sorts.
extern "C" void emulate_valid_ids(const Call* call) {
  const Call& c = *call;
  const int64_t slots = c.tokens * c.top_k;
  emulator::launch((slots + 127) / 128, 128, c.reversed, [&] {
    moe::valid_ids_kernel(c.ids, c.valid_tokens, c.valid_ids, slots, c.top_k, 128);
  });
}

// Returns the number of rows that the plan has.
extern "C" int64_t emulate_moe_experts(const Call* call) {
  const Call& c = *call;
  emulator::lazy_products = c.lazy > 0;
  emulator::lazy_copies = c.lazy > 1;
  sm90::Plan plan = sm90::plan(c.tokens, c.top_k, c.experts, c.width, c.inner, c.multiprocessors);
  if (c.merged) plan.work.split = 0;
  const emulator::TensorMap up = map_of(c.w_up, c.width, (c.activation ? 2 : 1) * c.inner, c.experts, c.up_strides),
                            down = map_of(c.w_down, c.inner, c.width, c.experts, c.down_strides);
  const bool gated = c.activation > 0;
  const sm90::Problem p{plan.work, static_cast<const n3::device::BF16*>(c.x), c.order,
                        c.offsets, c.rows,
                        int32_t(c.width), int32_t(c.inner), int32_t(c.top_k), c.activation == 2};
  sm90::with_tile(plan.kernel, [&](auto* type) {
    using Tile = std::remove_pointer_t<decltype(type)>;
    emulator::launch_hopper(plan.blocks, sm90::kThreads, c.reversed, [&] {
      gated ? sm90::tensor_experts_kernel_sm90<Tile, true>(up, down, p)
            : sm90::tensor_experts_kernel_sm90<Tile, false>(up, down, p);
    });
  });
  const moe::Combine combine{c.rows,
                             c.weights,
                             c.valid_tokens ? c.valid_ids : c.ids,
                             static_cast<n3::device::BF16*>(c.y),
                             int32_t(c.top_k),
                             sm90::rows_per_slot(plan.work),
                             int32_t(c.width),
                             c.first_expert,
                             int32_t(c.experts)};
  emulator::launch(plan.combine_blocks, 32 * sm90::kCombineWarps, c.reversed, [&] { moe::combine_kernel(combine); });
  return c.tokens * c.top_k * sm90::rows_per_slot(plan.work);
}
