// The gradients of some rows of a group's weights, from its blocks of slots.
#pragma once
#include <algorithm>
#include <vector>

#include "experts_bwd_layout_lanes.h"

namespace n3::moe_bwd {
namespace {

// Rows begin .. begin + count of one half of dW_up or of dW_down.
struct Part {
  bool down;
  int64_t half, begin, count;
};

int64_t parts_of_inner(const Problem& p) { return parts_of(p.inner, kPartRows); }

int64_t weight_parts(const Problem& p) {
  return p.halves * parts_of_inner(p) + (p.down ? parts_of(p.width, kPartRows) : 0);
}

Part part_at(const Problem& p, int64_t index) {
  const int64_t of_inner = parts_of_inner(p);
  const bool down = index >= p.halves * of_inner;
  const int64_t half = down ? 0 : index / of_inner;
  const int64_t begin = (index - (down ? p.halves : half) * of_inner) * kPartRows;
  return {down, half, begin, std::min(kPartRows, (down ? p.width : p.inner) - begin)};
}

// Columns of a part's sums: enough for the panels of either weight's rows.
int64_t sum_cols(const Problem& p) {
  return std::max(Panels::floats(1, p.width), parts_of(p.inner, kStrip) * Panels::floats(1, kStrip));
}

int64_t sum_floats(const Problem& p) { return weight_parts(p) * kPartRows * sum_cols(p); }

template <typename T>
class Weights {
 public:
  Weights(const Problem& p, const WeightRows& rows) : p_(p), rows_(rows), part_(part_at(p, rows.part)) {
    cols_ = part_.down ? p.inner : p.width;
    T* first = static_cast<T*>(part_.down ? p.ddown : p.dup);
    const int64_t of_group = part_.down ? p.width : p.halves * p.inner;
    out_ = first + (rows.group * of_group + part_.half * p.inner + part_.begin) * cols_;
    sums_ = rows.sums ? rows.sums + rows.part * kPartRows * sum_cols(p) : nullptr;
    for (const Block& block : rows.blocks) {
      const Kept kept(p, block.count, block.memory);
      const Strips& a = part_.down ? kept.wdy : kept.dh[part_.half];
      operands_.push_back({a.at(0, part_.begin), kept, block.count});
    }
  }

  // One block's operands are small: rows outside, so that the output is written in order. Of many blocks a panel is
  // kept in the cache and serves all the rows.
  void run() {
    const int64_t together = rows_.blocks.size() > 1 ? kPartRows : kTileRows;
    for (int64_t row = 0; row < part_.count; row += together) {
      for (int64_t strip = 0; strip < cols_; strip += part_.down ? kStrip : cols_) {
        for_panels(part_.down ? std::min(kStrip, cols_ - strip) : cols_, [&](auto vectors, int64_t col) {
          for (int64_t r = row; r < std::min(row + together, part_.count); r += kTileRows) tile<vectors>(r, strip, col);
        });
      }
    }
  }

 private:
  template <int V>
  void tile(int64_t row, int64_t strip, int64_t col) {
    float* sums = sums_ + row * sum_cols(p_) + strip / kStrip * Panels::floats(1, kStrip) + col;
    if (rows_.end) {  // the rows below, for their stores
      const T* next = out_ + (row + kTileRows) * cols_ + strip + col;
      for (int r = 0; r < kTileRows; ++r) {
        for (size_t byte = 0; byte < V * kLanes * sizeof(T); byte += 64) {
          __builtin_prefetch(reinterpret_cast<const char*>(next + r * cols_) + byte, 1);
        }
      }
    }
    Tile<V> tile;
    if (rows_.begin) {
      tile.zero();
    } else {
      tile.load(sums, sum_cols(p_));
    }
    for (const auto& [a, kept, count] : operands_) {
      const float* b = part_.down ? kept.a_panel(strip / kStrip, col) : kept.x.at(col);
      tile.add(Columns{a + row, kStrip}, b, kPanel, 0, count);
    }
    if (rows_.end) {
      store_tile(out_ + row * cols_ + strip + col, cols_, tile, part_.count - row, cols_ - strip - col);
    } else {
      tile.store(sums, sum_cols(p_));
    }
  }

  struct Operands {
    const float* a;  // Columns of the part's first rows
    Kept kept;
    int64_t count;
  };

  const Problem& p_;
  const WeightRows& rows_;
  Part part_;
  std::vector<Operands> operands_;
  int64_t cols_;
  T* out_;
  float* sums_;
};

template <typename T>
void weights(const Problem& p, const WeightRows& rows) {
  Weights<T>(p, rows).run();
}

}  // namespace
}  // namespace n3::moe_bwd
