// How grouped_linear runs on sm_90: tiles, shared memory, items. Pure host arithmetic and functions of the kernel.
#pragma once
#include "experts_plan.h"

namespace n3::grouped_linear::sm90 {

namespace items = moe_experts::sm90;  // the same list: groups are experts, rows tokens, blocks of outputs ranges

constexpr int kRows = 128, kOutputs = 256, kDepth = 64;  // of a tile; of a step in k
constexpr int kStages = 4;
constexpr int kLag = 2;  // copies of rows that are under way while the next are issued

struct Shared {
  static constexpr int kRowBytes = kRows * 128, kWeights = kOutputs * 128, kStage = kRowBytes + kWeights;
  static constexpr int kListAt = kStages * kStage;                       // groups' ends, their tiles before
  static constexpr int kList = 4 * (items::kMostExperts + 4);
  static constexpr int kSourcesAt = kListAt + 2 * kList;                 // rows of x of a tile
  static constexpr int kTotalsAt = kSourcesAt + 4 * kRows;
  static constexpr int kBarriersAt = kTotalsAt + 4 * (items::kThreads / 32);
  static constexpr int kBytes = kBarriersAt + 8 * 2 * kStages;
  static_assert(kBytes <= items::kSharedLimit && kBarriersAt % 8 == 0);

  N3_HD static int rows_at(int stage) { return stage * kStage; }
  N3_HD static int weights_at(int stage) { return stage * kStage + kRowBytes; }
};

struct Plan {
  items::Work work;
  int64_t blocks;
};

inline Plan plan(int64_t rows, int64_t groups, int64_t n, int64_t multiprocessors) {
  items::Work w{};
  w.experts = int32_t(groups), w.ranges = int32_t((n + kOutputs - 1) / kOutputs), w.split = 1;
  // Every row is in an item or in no group: then a block writes its zeros.
  const int64_t tiles = rows < groups + rows / kRows ? rows : groups + rows / kRows, most = tiles * w.ranges;
  return {w, most < multiprocessors ? most : multiprocessors};
}

}  // namespace n3::grouped_linear::sm90
