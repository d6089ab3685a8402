// Scratch memory of a call: on a cache line, not initialised.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace n3 {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <typename T>
using Buffer = std::unique_ptr<T[], Free>;

template <typename T>
Buffer<T> buffer(int64_t bytes) {
  const int64_t lines = std::max<int64_t>((bytes + 63) / 64, 1);  // of no bytes aligned_alloc may return null
  Buffer<T> memory(static_cast<T*>(std::aligned_alloc(64, lines * 64)));
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace n3
