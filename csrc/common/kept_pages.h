// Outputs of many megabytes that are made again and again, as gradients of weights are in training. In fresh pages the
// system would first clear each of them, a third of the time of a whole backward; so the pages of such an output are
// kept when it is freed, for the next one of its size.
//
// What is kept is marked as free (MADV_FREE): the system takes it whenever it is short of memory, and a page that it
// took comes back cleared, as a fresh one does. Kept and used together are never more than was used at once.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace n3 {

#if defined(__linux__) && defined(MADV_HUGEPAGE) && defined(MADV_FREE)

class KeptPages {
 public:
  // Never destroyed: tensors live on while a process ends.
  static KeptPages& of_process() {
    static auto* const pages = new KeptPages;
    return *pages;
  }

  static int64_t whole(int64_t bytes) { return (bytes + kHuge - 1) / kHuge * kHuge; }

  // `bytes` must be whole huge pages.
  void* take(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    used_ += bytes;
    most_ = std::max(most_, used_);
    void* p = nullptr;
    const auto last = std::find_if(kept_.rbegin(), kept_.rend(), [&](const Block& b) { return b.bytes == bytes; });
    if (last != kept_.rend()) {
      p = last->p;
      kept_bytes_ -= bytes;
      kept_.erase(std::next(last).base());
    }
    while (used_ + kept_bytes_ > most_) drop_oldest();
    if (!p) p = fresh(bytes);
    if (!p) used_ -= bytes;
    return p ? p : throw std::bad_alloc();
  }

  void give_back(void* p, int64_t bytes) {
    const bool marked = madvise(p, bytes, MADV_FREE) == 0;  // else the system has no such thing
    const std::lock_guard lock(mutex_);
    used_ -= bytes;
    if (!marked) {
      munmap(p, bytes);
      return;
    }
    kept_.push_back({p, bytes});
    kept_bytes_ += bytes;
  }

 private:
  static constexpr int64_t kHuge = int64_t(2) << 20;

  struct Block {
    void* p;
    int64_t bytes;
  };

  void drop_oldest() {
    munmap(kept_.front().p, kept_.front().bytes);
    kept_bytes_ -= kept_.front().bytes;
    kept_.erase(kept_.begin());
  }

  // At the boundary of a huge page; null where there is no memory.
  static void* fresh(int64_t bytes) {
    void* const mapped = mmap(nullptr, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    char* const begin = static_cast<char*>(mapped);
    const int64_t before = -reinterpret_cast<uintptr_t>(begin) & (kHuge - 1);
    if (before) munmap(begin, before);
    munmap(begin + before + bytes, kHuge - before);
    madvise(begin + before, bytes, MADV_HUGEPAGE);
    return begin + before;
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // the oldest first
  int64_t used_ = 0, kept_bytes_ = 0, most_ = 0;
};

// An uninitialised tensor of the same sizes and dtype, contiguous, on the CPU.
inline torch::stable::Tensor new_in_kept_pages(const torch::stable::Tensor& like) {
  constexpr int64_t kLeast = int64_t(8) << 20;  // below, malloc hands out memory that was freed before
  const int64_t bytes = KeptPages::whole(like.numel() * int64_t(like.element_size()));
  if (bytes < kLeast) return torch::stable::new_empty(like, like.sizes());
  std::vector<int64_t> strides(like.dim());
  int64_t stride = 1;
  for (int64_t i = like.dim(); i-- > 0; stride *= like.size(i)) strides[i] = stride;
  void* const p = KeptPages::of_process().take(bytes);
  return torch::stable::from_blob(p, like.sizes(), strides, like.device(), like.scalar_type(),
                                  [bytes](void* data) { KeptPages::of_process().give_back(data, bytes); });
}

#else

inline torch::stable::Tensor new_in_kept_pages(const torch::stable::Tensor& like) {
  return torch::stable::new_empty(like, like.sizes());
}

#endif

}  // namespace n3
