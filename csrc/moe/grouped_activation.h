// The activations of grouped_linear, without torch.
#pragma once

namespace n3::grouped_linear {

enum class Activation { kNone, kRelu2, kSilu, kGelu };  // silu and gelu gate: act(first half of n) * second half

constexpr bool is_gated(Activation a) { return a == Activation::kSilu || a == Activation::kGelu; }

}  // namespace n3::grouped_linear
