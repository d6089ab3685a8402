// The global scales and the scale layout of one call of a quantiser on the CPU.
#pragma once
#include <atomic>
#include <vector>

#include "../common/buffer.h"
#include "../common/element.h"
#include "quantize.h"
#include "quantize_kernels.h"

namespace n3::nvfp4_quantize {

// Work of a thread at least, some 10 us: blocks of 16 elements.
constexpr int64_t kGrain = 2048;

// A maximum does not depend on the order, so neither does anything on the number of threads.
class Maximum {
 public:
  void add(uint32_t bits) {
    uint32_t seen = top_.load();
    while (bits > seen && !top_.compare_exchange_weak(seen, bits)) {
    }
  }
  float value() const { return bits_float(top_.load()); }

 private:
  std::atomic<uint32_t> top_{0};
};

// The elements of a tensor side by side, alive with this; null where there is none.
template <typename T>
class Dense {
 public:
  explicit Dense(const std::optional<Tensor>& t) {
    if (t) kept_ = torch::stable::contiguous(*t);
  }
  const T* data() const { return kept_ ? static_cast<const T*>(kept_->const_data_ptr()) : nullptr; }

 private:
  std::optional<Tensor> kept_;
};

// A tensor as matrices that can be read: where it lies, or a copy that lives as long as this does.
class Readable {
 public:
  explicit Readable(const Tensor& t) : in_place_(matrices_of(t)) {
    if (!in_place_) kept_ = torch::stable::contiguous(t), in_place_ = matrices_of(*kept_);
  }
  const Matrices& matrices() const { return *in_place_; }

 private:
  std::optional<Matrices> in_place_;
  std::optional<Tensor> kept_;
};

// What a given decode scale stands for.
Global given_global(float scale, const Form& form);

// Where row r of matrices begins.
inline const void* row_at(const Matrices& m, Element element, int64_t r) {
  const int64_t i = r / m.rows * m.batch_stride + r % m.rows * m.row_stride;
  return static_cast<const char*>(m.data) + i * element_size(element);
}

class Encoder {
 public:
  // p: with pointers to the outputs and to a given global scale, if any.
  explicit Encoder(const Params& p);

  bool given() const { return p_.global_scale; }
  // Before a row is encoded where no scale was given: the largest finite magnitude of the row, or of all.
  void set_amax(int64_t row, float amax);
  const Encoding& encoding() const { return encoding_; }
  // Encodes dense rows [row, row + rows), which lie side by side at x, after setting their amax if they have their own.
  void encode_rows(const void* x, Element element, int64_t row, int64_t rows);
  // Once all is encoded: scales go to their tiles.
  void finish() const;

 private:
  Params p_;
  std::vector<Global> globals_;
  Buffer<uint8_t> linear_;  // where scales wait for their tiles
  Encoding encoding_;
};

}  // namespace n3::nvfp4_quantize
