// How sums over tokens or rows are split in the backward kernels of a GPU: pure host arithmetic.
#pragma once
#include <algorithm>
#include <cstdint>

namespace n3::mamba {

constexpr int64_t kMostPieces = 128;
constexpr int64_t kFewestEach = 16;
constexpr int kSumColumns = 32, kSumSlices = 8;  // a block of sum_kernel

// Pieces of neighbouring rows, each of which leaves a row of sums: of the number of rows alone, so that no bit of the
// sums depends on the GPU.
struct Pieces {
  int64_t each, count;
};

inline Pieces pieces(int64_t rows) {
  const int64_t each = std::max((rows + kMostPieces - 1) / kMostPieces, kFewestEach);
  return {each, (rows + each - 1) / each};
}

}  // namespace n3::mamba
