// How ssm_update runs on a GPU: pure host arithmetic.
#pragma once
#include <cstdint>

namespace n3::ssm_update {

constexpr int kThreads = 128;
constexpr int64_t kMaxState = 1024;  // N, the values of a row: 32 lanes of 8 groups of 4

// Lanes to a row and groups of 4 elements to a lane; in vectors where the layout of the states allows. By N and the
// layout alone: T tokens at once and one by one, in any batch and in mamba2_decode, are summed in one order.
struct Shape {
  int lanes, groups;
  bool vectors;
};

constexpr Shape shape(int64_t d_state, bool vectors) {
  if (vectors && d_state <= 128) return {8, 4, true};  // a warp reads 4 rows of N = 128, 128 bytes of each at a time
  if (vectors && d_state <= 256) return {16, 4, true};
  return {32, 8, false};
}

struct Plan {
  Shape shape;
  int64_t tiles;   // of a head's rows; a block takes one
  int64_t blocks;
};

inline Plan plan(int64_t batch, int64_t heads, int64_t head_dim, int64_t d_state, bool vectors) {
  const Shape s = shape(d_state, vectors);
  const int64_t rows = kThreads / s.lanes, tiles = (head_dim + rows - 1) / rows;
  return {s, tiles, batch * heads * tiles};
}

// Steps of the recurrence whose B and C are in shared memory at a time: 16 KiB, 32 for the widest rows.
constexpr int tile_steps(int width) { return width <= 128 ? 16 : width <= 256 ? 8 : 4; }

}  // namespace n3::ssm_update
