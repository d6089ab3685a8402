// How grouped_linear runs on sm_90: tiles, shared memory, items. Pure host arithmetic and functions of the kernels.
#pragma once
#include "experts_plan.h"

namespace n3::grouped_linear::sm90 {

namespace items = moe_experts::sm90;  // the same list: groups are experts, rows tokens, blocks of outputs ranges

constexpr int kOutputs = 256;  // rows of the weights, of a tile: gated, twice as many as its results have columns
constexpr int kLag = 2;        // copies of rows that are under way while the next are issued

// Results: rows of y; or rows of float32, each where it is wanted; or activations in the order in which the next
// product with NVFP4 weights wants them (grouped_nvfp4_plan.h), whole pieces, zeros at the end.
enum class To { kRows, kSlots, kOrdered };

// A tile has kRows rows of x. A stage has kDepth k of them, in blocks of 64, rows of 128 bytes; behind them kWeights
// bytes of weights.
template <int kRows_, int kDepth_, int kWeights_>
struct Shared {
  static constexpr int kRows = kRows_, kDepth = kDepth_, kWeights = kWeights_;
  static constexpr int kBlock = kRows * 128, kRowBytes = kDepth / 64 * kBlock, kStage = kRowBytes + kWeights;
  static constexpr int kList = 4 * (items::kMostExperts + 4);            // groups' ends, their tiles before
  static constexpr int kSources = 4 * kRows;                             // rows of x of a tile
  static constexpr int kTotals = 4 * (items::kThreads / 32);
  static constexpr int kMostStages = 8, kBarriers = 8 * (2 * kMostStages + 1);
  static constexpr int kStages = (items::kSharedLimit - 2 * kList - kSources - kTotals - kBarriers) / kStage;
  static_assert(kStages > kLag && kStages <= kMostStages && kStage % 1024 == 0);

  static constexpr int kListAt = kStages * kStage;
  static constexpr int kSourcesAt = kListAt + 2 * kList;
  static constexpr int kTotalsAt = kSourcesAt + kSources;
  static constexpr int kBarriersAt = kTotalsAt + kTotals;
  static constexpr int kBytes = kBarriersAt + kBarriers;
  static_assert(kBytes <= items::kSharedLimit && kBarriersAt % 8 == 0);

  N3_HD static int rows_at(int stage, int block) { return stage * kStage + block * kBlock; }
  N3_HD static int weights_at(int stage) { return stage * kStage + kRowBytes; }
};
using Dense = Shared<128, 64, kOutputs * 128>;

struct Plan {
  items::Work work;
  int64_t blocks;
};

// `outputs`: of a row of the result; a tile has `per_tile` of them, and `tile_rows` rows.
inline Plan plan(int64_t rows, int64_t groups, int64_t outputs, int64_t per_tile, int64_t tile_rows,
                 int64_t multiprocessors) {
  items::Work w{};
  w.experts = int32_t(groups), w.ranges = int32_t((outputs + per_tile - 1) / per_tile), w.split = 1;
  // Every row is in an item or in no group: then a block writes its zeros.
  const int64_t most = groups + rows / tile_rows, items = (rows < most ? rows : most) * w.ranges;
  return {w, items < multiprocessors ? items : multiprocessors};
}

}  // namespace n3::grouped_linear::sm90
