// The kernel of moe_experts on sm_90, with dense and with NVFP4 weights, under the emulator, with one C entry for
// tests/moe/emulated_experts.py, which describes the tensors as the launcher would.
#include "cuda_emulator.h"
#include "hopper_emulator.h"

inline int32_t atomicAdd(int32_t* at, int32_t v) { return *at += v, *at - v; }  // one thread runs at a time
inline int __popc(uint32_t v) { return __builtin_popcount(v); }

#include "moe/experts_combine_kernel.cuh"
#include "moe/experts_nvfp4_sm90_kernel.cuh"
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
namespace nvfp4 = n3::moe_experts::sm90::nvfp4;

struct Weights {  // dense or codes; scales: null, or those of the codes
  const void *data, *scales;
  const float* global;
  int64_t strides[2], scale_strides[2];  // of expert and row, in elements
};

struct Call {
  int64_t tokens, top_k, experts, width, inner, first_expert, multiprocessors;
  const void* x;
  Weights up, down;
  const int32_t *ids, *valid_tokens;
  const float* weights;
  float* rows;
  uint32_t* counters;
  void* y;
  int64_t activation, float_y, first_token;  // relu2, silu, gelu
  int64_t merged;                            // as if rows were too many
  // lazy: 1 the products, 2 the copies as well. side_by_side: blocks that run at once; order: a seed of blocks' order
  int64_t lazy, reversed, side_by_side, order;
};

emulator::TensorMap map_of(const Weights& w, int64_t columns, int64_t rows, int64_t experts) {
  const auto* data = static_cast<const char*>(w.data);
  if (w.scales) {
    const int64_t pitch = w.strides[1] / 2;
    return {data, {pitch + columns / 4, rows / 2, experts, 1}, {2, 4 * pitch, w.strides[0], w.strides[0]},
            {32, 32, 1, 1}, 64};
  }
  return {data, {columns, rows, experts, 1}, {2, 2 * w.strides[1], 2 * w.strides[0], 2 * w.strides[0]},
          {64, 64, 1, 1}, 128};
}

nvfp4::Scales scales_of(const Weights& w) {
  return {static_cast<const uint8_t*>(w.scales), w.scale_strides[0], w.scale_strides[1], w.global};
}

template <template <typename, bool> typename Format, template <typename> typename RingOf, typename Operands>
int64_t run(const Call& c, sm90::Kernel kernel, const Operands& operands) {
  sm90::Plan plan =
      sm90::plan<RingOf>(kernel, c.tokens, c.top_k, c.experts, c.width, c.inner, c.multiprocessors);
  if (c.merged) plan.work.split = 0;
  const emulator::TensorMap up = map_of(c.up, c.width, (c.activation ? 2 : 1) * c.inner, c.experts),
                            down = map_of(c.down, c.inner, c.width, c.experts);
  const sm90::Call call{plan.work, static_cast<const n3::device::BF16*>(c.x), c.ids, c.weights, c.valid_tokens, c.rows,
                        c.counters, c.y, int32_t(c.first_expert), int32_t(c.tokens), int32_t(c.top_k),
                        int32_t(c.width), int32_t(c.inner), c.first_token, c.activation == 2, c.float_y != 0};
  const int64_t at_once = std::min<int64_t>(c.side_by_side, plan.blocks);
  emulator::order_blocks(c.order);
  sm90::with_tile(plan.kernel, [&](auto* type) {
    using Tile = std::remove_pointer_t<decltype(type)>;
    const auto launch = [&]<bool kGated>() {
      using F = Format<Tile, kGated>;
      if constexpr (F::kFits) {
        const sm90::Problem<F> p{call, operands};
        emulator::launch_hopper(plan.blocks, sm90::kThreads, c.reversed,
                                [&] { sm90::tensor_experts_kernel_sm90<F>(up, down, p); }, int(at_once ? at_once : 1));
      }
    };
    c.activation ? launch.template operator()<true>() : launch.template operator()<false>();
  });
  emulator::order_blocks(0);
  return c.tokens * c.top_k * sm90::rows_per_slot(plan.work);
}

}  // namespace

extern "C" {

// Returns the number of rows that the plan has.
int64_t emulate_moe_experts(const Call* call) {
  const Call& c = *call;
  emulator::lazy_products = c.lazy > 0;
  emulator::lazy_copies = c.lazy > 1;
  if (!c.up.scales) return run<sm90::Dense, sm90::DenseRing>(c, sm90::kernel_for(c.width), sm90::DenseOperands{});
  const nvfp4::Operands operands{scales_of(c.up), scales_of(c.down), int32_t(c.up.strides[1] / 2),
                                 int32_t(c.down.strides[1] / 2)};
  return run<nvfp4::Packed, nvfp4::PackedRing>(c, nvfp4::kernel_for(c.width, c.activation > 0), operands);
}

// The sum as a launch of its own, behind kernels for many tokens, of `parts` rows per slot.
void emulate_combine(const Call* call, int64_t parts) {
  const Call& c = *call;
  const moe::Combine combine{c.rows, c.weights, c.ids, c.y, c.float_y != 0, int32_t(c.top_k), int32_t(parts),
                             int32_t(c.width), c.first_expert, int32_t(c.experts)};
  const int64_t blocks = c.tokens * ((c.width + sm90::kCombineColumns - 1) / sm90::kCombineColumns);
  emulator::launch(blocks, 32 * sm90::kCombineWarps, c.reversed, [&] { moe::combine_kernel(combine); });
}

// ids with -1 in padding rows, to `to`.
void emulate_valid_ids(const Call* call, int32_t* to) {
  const Call& c = *call;
  const int64_t slots = c.tokens * c.top_k;
  emulator::launch((slots + 127) / 128, 128, c.reversed, [&] {
    moe::valid_ids_kernel(c.ids, c.valid_tokens, to, slots, c.top_k, 128);
  });
}

}  // extern "C"
