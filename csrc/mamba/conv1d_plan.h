// How causal_conv1d and causal_conv1d_update run on a GPU: pure host arithmetic.
#pragma once
#include <cstdint>

#include "partial_sums_plan.h"

namespace n3::causal_conv1d {

constexpr int kThreads = 128;
constexpr int64_t kTile = 16;     // tokens of a thread: W - 1 more are read, 19 for 16 outputs of width 4
constexpr int64_t kFewTaps = 4;   // up to this width the window is kept in registers

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Tiles of tokens, behind them a tile per checkpoint, behind them one per final state; for each a block per kThreads
// threads of `vector` channels.
struct Plan {
  int64_t tiles, states, channel_blocks, blocks;
};

inline Plan plan(int64_t tokens, int64_t states, int64_t channels, int64_t vector) {
  const int64_t tiles = ceil_div(tokens, kTile), channel_blocks = ceil_div(channels, kThreads * vector);
  return {tiles, states, channel_blocks, (tiles + states) * channel_blocks};
}

// Pieces of the tokens, behind them the sequences whose initial states have gradients.
struct BackwardPlan {
  mamba::Pieces pieces;
  int64_t channel_blocks, blocks;
};

constexpr int64_t kBackwardVector = 4;  // channels of a thread: the window, its gradients and the sums fill registers

inline BackwardPlan backward_plan(int64_t tokens, int64_t states, int64_t channels, int64_t vector) {
  const mamba::Pieces pieces = mamba::pieces(tokens);
  const int64_t channel_blocks = ceil_div(channels, kThreads * vector);
  return {pieces, channel_blocks, (pieces.count + states) * channel_blocks};
}

}  // namespace n3::causal_conv1d
