// How causal_conv1d_update runs on a GPU: pure host arithmetic.
#pragma once
#include <cstdint>

namespace n3::causal_conv1d {

constexpr int kUpdateThreads = 128;

// A thread per sequence and channel.
inline int64_t update_channel_blocks(int64_t channels) { return (channels + kUpdateThreads - 1) / kUpdateThreads; }

}  // namespace n3::causal_conv1d
