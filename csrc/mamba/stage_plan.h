// How states are copied before a launch that might overwrite them unread: pure host arithmetic.
#pragma once
#include <cstdint>

namespace n3::mamba {

constexpr int kStageThreads = 256;
constexpr int kMaxSources = 3;         // convolution state, SSM state, its scales
constexpr int64_t kStageBytes = 65536;  // that one block copies

// Blocks per sequence.
inline int stage_pieces(int64_t bytes_per_sequence) {
  const int64_t pieces = (bytes_per_sequence + kStageBytes - 1) / kStageBytes;
  return int(pieces < 1 ? 1 : pieces > 1024 ? 1024 : pieces);
}

}  // namespace n3::mamba
