// How the quantisers run on a GPU, and what their kernels are given: pure host arithmetic, no torch.
#pragma once
#include <algorithm>
#include <cstdint>

#include "swizzle_plan.h"

namespace n3::nvfp4_quantize {

constexpr int kThreads = 256;
constexpr int kMaxPartials = kThreads;  // maxima that one launch leaves to the next: a thread of a block reads one
constexpr int kMaxBlocks = 4096;        // of a launch; a block goes on to further tiles, and reads the maxima once
constexpr int kMaxSplits = 16;          // parts of a row of x.mT, whose maxima are found apart

// Quotients by multiplication. Exact below 2^31: the magic number is 2^shift / d + e, 0 <= e < 1, 2^shift >= 2^31 d.
struct Divider {
  uint32_t magic = 1u << 31, shift = 31;
  N3_HD uint32_t quotient(uint32_t n) const { return uint32_t(uint64_t(n) * magic >> shift); }
};

inline Divider divider(int64_t d) {
  uint32_t log = 0;
  while ((int64_t(1) << log) < d) ++log;
  const uint64_t power = uint64_t(1) << (31 + log);
  return {uint32_t((power + uint64_t(d) - 1) / uint64_t(d)), 31 + log};
}

// Rows in memory: matrices of `rows_each` rows. Strides are in elements.
struct Rows {
  const void* data;
  int64_t row_stride, batch_stride;
  int64_t rows_each;
  Divider by_rows;  // by rows_each; there are fewer than 2^31 rows where there is more than one matrix
  bool one_matrix;
  bool vectors;  // every row is 16-byte aligned; of x.mT: every pair of rows is aligned to its size

  N3_HD int64_t at(int64_t row) const {
    if (one_matrix) return row * row_stride;
    const int64_t batch = by_rows.quotient(uint32_t(row));
    return batch * batch_stride + (row - batch * rows_each) * row_stride;
  }
};

// Matrices [rows, k] of elements of some bytes. Where a vector load would not be aligned, elements are loaded.
inline Rows rows_at(const void* data, int64_t batches, int64_t rows, int64_t batch_stride, int64_t row_stride,
                    int64_t k_stride, int64_t element) {
  const int64_t unit = k_stride == 1 ? 16 : 2 * element, stride = k_stride == 1 ? row_stride : k_stride;
  const bool vectors = reinterpret_cast<uintptr_t>(data) % unit == 0 && stride * element % unit == 0 &&
                       (batches == 1 || batch_stride * element % unit == 0);
  return {data, row_stride, batch_stride, rows, divider(batches > 1 ? std::max<int64_t>(rows, 1) : 1), batches == 1,
          vectors};
}

struct Args {
  Rows x;
  int64_t k_stride;  // 1 but for x.mT, whose row stride is 1
  int64_t rows, ks;  // of the output: ks blocks of 16 per row
  uint8_t *q, *block_scale;
  float* global_out;
  const float* given;       // global scale: 1, or one per row; null: from `partial`, or from the row itself
  const uint32_t* partial;  // maxima as bits: [partials], or [partials, rows] of the rows of x.mT
  int32_t partials;
  const float* signs;   // [16] of the Hadamard rotation, 16-byte aligned; null: none
  const int64_t* seed;  // key and offset of stochastic rounding; null: nearest
  bool four_over_six, mse, per_row, swizzled, square;
};

// A tensor without gaps is one long row to a kernel that does not ask for rows.
inline Args as_one_row(Args args) {
  if (!args.x.one_matrix || args.x.row_stride != args.ks * 16 || args.swizzled || args.per_row) return args;
  args.ks *= args.rows;
  args.rows = args.x.rows_each = 1;
  return args;
}

// A thread block works on tiles of `height` rows and `width` blocks of 16, numbered along the rows first.
struct Tiles {
  uint32_t count;
  uint32_t across;  // tiles side by side
  Divider by_across;
  int32_t log_width, height;

  uint32_t blocks(uint32_t limit = kMaxBlocks) const { return std::max(1u, std::min(count, limit)); }
};

inline Tiles tiles_of(int64_t rows, int64_t ks, int log_width, int height) {
  const int64_t across = std::max<int64_t>((ks + (int64_t(1) << log_width) - 1) >> log_width, 1);
  const int64_t down = (rows + height - 1) / height;
  return {uint32_t(across * down), uint32_t(across), divider(across), log_width, height};
}

N3_HD int64_t rows_to_write(int64_t rows, bool swizzled) { return swizzled ? nvfp4_swizzle::padded_rows(rows) : rows; }
N3_HD int64_t cols_to_write(int64_t ks, bool swizzled) { return swizzled ? nvfp4_swizzle::padded_cols(ks) : ks; }

// One thread per block of 16. The widest tile that leaves less than a sixteenth of its threads idle, else the one that
// leaves the fewest: a wide tile reads longer stretches of memory.
inline Tiles row_tiles(int64_t rows, int64_t ks) {
  int best = 0;
  int64_t least = ks + ks / 15;
  for (int log = 8; log > 0; --log) {
    const int64_t wide = (ks + (int64_t(1) << log) - 1) >> log << log;
    if (wide <= least) {
      best = log;
      break;
    }
  }
  return tiles_of(rows, ks, best, kThreads >> best);
}

// Whole rows in a tile: as many threads on a row as it has blocks, 256 at most, which then take several in turn.
inline Tiles whole_row_tiles(int64_t rows, int64_t ks) {
  int log = 0;
  while (log < 8 && (int64_t(1) << log) < ks) ++log;
  return tiles_of(rows, 1, log, kThreads >> log);
}

// A thread has 2 blocks, 8 rows apart; a warp has 16 rows and 4 blocks of each, 128 bytes in 16-bit types.
inline Tiles square_tiles(int64_t rows, int64_t ks) {
  int log = 2;
  while (log < 5 && (int64_t(1) << log) < ks) ++log;
  return tiles_of(rows, ks, log, 2 * kThreads >> log);
}

// Of x.mT: a warp has one block of each of 64 rows, a thread those of two neighbours. Tiles do not straddle matrices;
// of `down` to a matrix, the last matrix's also cover the padding of the scales.
constexpr int kTransposedRows = 64, kTransposedBlocks = kThreads / 32;

struct TransposedTiles {
  Tiles tiles;
  Divider by_down;
  uint32_t down;
};

inline TransposedTiles transposed_tiles(int64_t rows, int64_t ks, int64_t rows_each, bool swizzled) {
  const int64_t batches = rows_each ? rows / rows_each : 0;
  const int64_t padding = rows_to_write(rows, swizzled) - rows;
  const int64_t down = (rows_each + padding + kTransposedRows - 1) / kTransposedRows;
  const Tiles tiles = tiles_of(batches * down * kTransposedRows, cols_to_write(ks, swizzled), 3, kTransposedRows);
  return {tiles, divider(std::max<int64_t>(down, 1)), uint32_t(down)};
}

// Maxima of the rows of x.mT: splits of a row, enough for about 512 thread blocks.
inline int32_t row_splits(const TransposedTiles& t) {
  const int64_t tall = std::max<int64_t>(t.tiles.count / t.tiles.across, 1);
  return int32_t(std::clamp<int64_t>(512 / tall, 1, std::min<int64_t>(kMaxSplits, t.tiles.across)));
}

}  // namespace n3::nvfp4_quantize
