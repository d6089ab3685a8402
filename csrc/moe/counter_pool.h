// Which words of a pool of zeros a launch counts in that leaves them zero. Pure host bookkeeping.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

namespace n3 {

// Launches of one stream run one after the other and share words; so do those that one capture of a CUDA graph takes
// from one stream, whose graph may then run beside others on any stream (though never beside itself). Words are not
// given back: a graph may be replayed for ever. An owner that needs more than before gets new ones, and twice as many.
class CounterPool {
 public:
  explicit CounterPool(int64_t words) : words_(words) {}

  // Where `words` words of this stream begin, `capture` being 0 outside a graph's capture; -1: the pool is used up.
  int64_t take(uint64_t capture, uint64_t stream, int64_t words) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Share& share = shares_[{capture, stream}];
    if (share.words < words) {
      int64_t wanted = kLeast;
      while (wanted < words) wanted *= 2;
      if (wanted > words_ - used_) wanted = words;
      if (wanted > words_ - used_) return -1;
      share = {used_, wanted};
      used_ += wanted;
    }
    return share.first;
  }

 private:
  static constexpr int64_t kLeast = 256;

  struct Share {
    int64_t first = 0, words = 0;
  };

  const int64_t words_;
  std::mutex mutex_;
  std::map<std::pair<uint64_t, uint64_t>, Share> shares_;
  int64_t used_ = 0;
};

}  // namespace n3
