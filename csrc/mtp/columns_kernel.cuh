// The columns of a drafter's logits by the token they stand for, where its vocabulary is a smaller one.
#pragma once
#include "rows.cuh"

namespace n3::mtp {

constexpr int kColumnsThreads = 1024;

struct ColumnMap {
  const int32_t* tokens;  // of each column; null: columns are tokens
  int32_t *first, *next;  // a token's first column; a column's next of the same token. -1: none
  int32_t columns, vocab;
};

// Calls f(column, its token) with the columns of this thread whose token is in [begin, end), ascending.
template <typename F>
N3_DEVICE void each_column(const ColumnMap& m, int32_t begin, int32_t end, F f) {
  constexpr int32_t kAtOnce = 8;  // loads under way
  for (int32_t start = int32_t(threadIdx.x); start < m.columns; start += kAtOnce * kColumnsThreads) {
    int32_t tokens[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int32_t column = start + i * kColumnsThreads;
      tokens[i] = column < m.columns ? m.tokens[column] : -1;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (tokens[i] >= begin && tokens[i] < end) f(start + i * kColumnsThreads, tokens[i]);
    }
  }
}

//   grid  tiles of the target's vocabulary     block  kColumnsThreads
// A token's columns are linked in ascending order, so that sums over them have one order. Most tokens have one at most:
// the column before one that is not the first is looked for.
__global__ __launch_bounds__(kColumnsThreads) void columns_kernel(const ColumnMap m) {
  __shared__ int32_t first[kTile];
  hopper::let_next_start();
  const int32_t begin = int32_t(blockIdx.x) * int32_t(kTile);
  const int32_t end = m.vocab - begin < int32_t(kTile) ? m.vocab : begin + int32_t(kTile);
  for (int32_t i = threadIdx.x; i < int32_t(kTile); i += kColumnsThreads) first[i] = m.columns;
  __syncthreads();
  each_column(m, begin, end, [&](int32_t column, int32_t token) {
    atomicMin(&first[token - begin], column);
    m.next[column] = -1;
  });
  __syncthreads();
  each_column(m, begin, end, [&](int32_t column, int32_t token) {
    if (first[token - begin] == column) return;
    int32_t before = column - 1;
    while (m.tokens[before] != token) --before;
    m.next[before] = column;
  });
  for (int32_t i = threadIdx.x; begin + i < end; i += kColumnsThreads) {
    m.first[begin + i] = first[i] < m.columns ? first[i] : -1;
  }
  // Not before: nothing here comes from the kernel before this one, whose end the next one relies on.
  hopper::wait_for_previous();
}

}  // namespace n3::mtp
