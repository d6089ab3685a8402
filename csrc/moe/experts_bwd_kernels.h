// What moe_experts_bwd and grouped_linear_bwd ask of each instruction set, and the arithmetic all of them keep.
//
// A group (an expert) of slots s, each with a row x of the inputs, a row dy of the output's gradient and a weight w:
//   h = W_up x     g = W_down^T dy, or dy itself where there is no W_down     dweights[s] = <act(h), g>
//   dh = act'(h) w g     dx[s] = W_up^T dh     dW_up = sum over s of dh x^T     dW_down = sum over s of (w dy) act(h)^T
// All in float32. An element of a product is one chain of fused multiply-adds, ascending over what is summed: over the
// gate's rows of W_up first and then the others, and for the weights' gradients over the slots in their order, however
// they are cut into blocks. dweights has 16 chains, element i in chain i % 16, added in order. So no result depends on
// blocks, threads or vector lengths, and a slot's dx and dweights on no other slot.
#pragma once
#include <cstdint>
#include <span>

#include "dense_kernels.h"

namespace n3::moe_bwd {

using dense_linear::Activation;  // silu and gelu gate: act(first half) * second half
using enum dense_linear::Activation;

constexpr int64_t kBlockSlots = 128;  // most slots of a block: products over it read the weights once

// One row of a group.
struct Slot {
  int64_t at;       // in weights, dweights and dx
  int64_t x, grad;  // rows
};

struct Problem {
  const void* x;         // [, width]
  const void* grad;      // [, width], or [, inner] without down
  const void* up;        // [groups, halves * inner, width]
  const void* down;      // [groups, width, inner] or null
  const float* weights;  // null: all 1
  float* dweights;       // null: not wanted
  float* dx;             // [, width]
  void *dup, *ddown;     // as up and down
  int64_t width, inner, halves;
  Activation activation;
};

// Slots of one group, at most kBlockSlots, and what the gradients of its weights need of them.
struct Block {
  const Slot* slots;
  int64_t count;
  float* memory;  // block_floats()
};

// Some rows of a group's dW_up or dW_down. Sums of more slots than memory holds blocks for go on in `sums`.
struct WeightRows {
  int64_t group, part;        // part: 0 <= part < weight_parts(problem)
  std::span<const Block> blocks;
  float* sums;                // sum_floats() for all parts of the group; null where begin and end
  bool begin, end;            // of the group's slots
};

struct Kernels {  // tables of three are indexed by the Element of all tensors but weights, dweights and dx
  int64_t (*block_floats)(const Problem& p, int64_t slots);
  int64_t (*scratch_floats)(const Problem& p, int64_t slots);
  // Writes the dx and dweights of a block's slots and fills its memory.
  void (*slots[3])(const Problem& p, int64_t group, const Block& block, float* scratch);
  int64_t (*weight_parts)(const Problem& p);
  int64_t (*sum_floats)(const Problem& p);
  void (*weights[3])(const Problem& p, const WeightRows& rows);
};

extern const Kernels kGenericKernels, kAvx2Kernels, kAvx512Kernels;

}  // namespace n3::moe_bwd
