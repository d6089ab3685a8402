// How the launchers of moe_experts on sm_90a call the kernel of one format of weights.
#pragma once
#include <type_traits>

#include "../common/launch.h"
#include "experts_cuda.h"
#include "experts_frame_sm90.cuh"

namespace n3::moe_experts::sm90 {

// One call's operands, but for the weights; all contiguous.
struct Batch {
  const Tensor &x, &ids, &weights, &y;
  const OptionalTensor& valid_tokens;
  cudaStream_t stream;
};

// Launches of as many tokens as the kernel's 16-bit slots allow, one launch up to kMostSlots slots per expert; a
// token's bits do not depend on where the batch is cut.
template <template <typename, bool> typename Format, template <typename> typename RingOf, typename Operands>
void run(const Params& p, Kernel kernel, const Batch& b, const CUtensorMap& up, const CUtensorMap& down,
         const Operands& operands) {
  int sms;
  N3_CUDA_CHECK(op, cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, b.x.get_device_index()));
  const int64_t step = tokens_of_a_launch(p.top_k, p.experts);
  const int64_t y_bytes = p.y_dtype == ScalarType::Float ? 4 : 2;
  for (int64_t first = 0; first < p.tokens; first += step) {
    const int64_t tokens = p.tokens - first < step ? p.tokens - first : step;
    const Plan plan = sm90::plan<RingOf>(kernel, tokens, p.top_k, p.experts, p.width, p.inner, sms);
    const Tensor rows = torch::stable::new_empty(b.x, {plan.rows, p.width}, ScalarType::Float);
    OptionalTensor owned;
    const Call call{plan.work,
                    static_cast<const device::BF16*>(b.x.const_data_ptr()) + first * p.width,
                    static_cast<const int32_t*>(b.ids.const_data_ptr()) + first * p.top_k,
                    static_cast<const float*>(b.weights.const_data_ptr()) + first * p.top_k,
                    b.valid_tokens ? static_cast<const int32_t*>(b.valid_tokens->const_data_ptr()) : nullptr,
                    static_cast<float*>(rows.mutable_data_ptr()),
                    zero_counters(b.x, plan.counters, b.stream, owned),
                    static_cast<char*>(b.y.mutable_data_ptr()) + first * p.width * y_bytes,
                    int32_t(p.first_expert),
                    int32_t(tokens),
                    int32_t(p.top_k),
                    int32_t(p.width),
                    int32_t(p.inner),
                    first,
                    p.activation == Activation::kGelu,
                    y_bytes == 4};
    const Grid grid{plan.blocks, kThreads, plan.shared, 1};
    with_tile(plan.kernel, [&](auto* type) {
      using Tile = std::remove_pointer_t<decltype(type)>;
      const auto launch = [&]<bool kGated>() {
        using F = Format<Tile, kGated>;
        if constexpr (F::kFits) {
          const Problem<F> problem{call, operands};
          launch_overlapping(op, tensor_experts_kernel_sm90<F>, grid, b.stream, up, down, problem);
        }
      };
      p.activation == Activation::kRelu2 ? launch.template operator()<false>() : launch.template operator()<true>();
    });
  }
}

}  // namespace n3::moe_experts::sm90
