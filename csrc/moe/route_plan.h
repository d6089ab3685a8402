// Limits of moe_route on every device, and how it runs on a GPU: pure host arithmetic.
#pragma once
#include <cstdint>

namespace n3::moe_route {

constexpr int kMaxExperts = 1024;
constexpr int kMaxTopK = 32;  // one lane of a warp for each
constexpr int kThreads = 128;

struct Plan {
  int per_lane;  // experts of a lane: 4, 8, 16 or 32
  int64_t blocks;
};

inline Plan plan(int64_t tokens, int64_t experts) {
  int per_lane = 4;
  while (32 * per_lane < experts) per_lane *= 2;
  return {per_lane, (tokens + kThreads / 32 - 1) / (kThreads / 32)};
}

}  // namespace n3::moe_route
