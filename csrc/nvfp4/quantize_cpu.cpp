#include <algorithm>

#include <torch/csrc/stable/library.h>

#include "quantize_encoder.h"

#define N3_LANES 4  // the vectors every x86-64 and AArch64 has
#include "quantize_walk.h"

namespace n3::nvfp4_quantize {

const Kernels kGenericKernels = kKernels;

const Kernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::kAmx:
    case Isa::kAvx512: return kAvx512Kernels;
    case Isa::kAvx2: return kAvx2Kernels;
    case Isa::kGeneric: break;
  }
#endif
  return kGenericKernels;
}

namespace {

constexpr int64_t kStripRows = 64;        // of columns: of 16-bit elements whole cache lines
constexpr int64_t kStripBlocks = 64;      // of a row
constexpr int64_t kChunkBytes = 1 << 15;  // of rows whose maxima are found and that are encoded in one go: in L1 or L2

// One tensor being quantised; nothing in it is empty.
class Quantizer {
 public:
  Quantizer(const Params& p, const Matrices& m, Element element)
      : p_(p), m_(m), element_(element), ks_(p.k / 16), encoder_(p) {}

  void run() {
    const bool columns = m_.k_stride != 1;
    if (p_.form.per_row) {
      columns ? rows_of_columns() : rows();
    } else {
      if (!encoder_.given()) encoder_.set_amax(0, amax());
      columns ? encode_columns() : p_.square ? encode_squares() : encode();
    }
    encoder_.finish();
  }

 private:
  // ---- the maximum of all

  float amax() {
    const bool columns = m_.k_stride != 1;
    const int64_t size = m_.batches * m_.rows * m_.k;
    const bool side_by_side = (columns ? m_.k_stride == m_.rows : m_.row_stride == m_.k) &&
                              (m_.batches == 1 || m_.batch_stride == m_.rows * m_.k);
    Maximum top;
    if (side_by_side && !p_.signs) {
      torch::stable::parallel_for(0, size, kGrain * 16, [&](int64_t begin, int64_t end) {
        const void* x = static_cast<const char*>(m_.data) + begin * element_size(element_);
        top.add(kernels().amax[element_](x, end - begin));
      });
    } else if (columns) {
      for_strips(kStripRows, ks_, [&](const Strip& strip) {
        uint32_t rows[kStripRows];
        kernels().column_amax[element_](m_, p_.signs, strip, rows);
        top.add(*std::max_element(rows, rows + strip.rows));
      });
    } else if (p_.signs) {
      torch::stable::parallel_for(0, p_.rows * ks_, kGrain, [&](int64_t begin, int64_t end) {
        top.add(kernels().rotated_amax[element_](m_, p_.signs, begin, end));
      });
    } else {
      torch::stable::parallel_for(0, p_.rows, row_grain(), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) top.add(kernels().amax[element_](row_at(m_, element_, r), p_.k));
      });
    }
    return top.value();
  }

  // ---- one global scale

  void encode() {
    torch::stable::parallel_for(0, p_.rows * ks_, kGrain, [&](int64_t begin, int64_t end) {
      kernels().encode[element_](m_, encoder_.encoding(), begin, end);
    });
  }

  void encode_squares() {
    for_strips(16, kStripBlocks, [&](const Strip& strip) {
      kernels().encode_square[element_](m_, encoder_.encoding(), strip);
    });
  }

  void encode_columns() {
    for_strips(kStripRows, kStripBlocks, [&](const Strip& strip) {
      kernels().encode_columns[element_](m_, encoder_.encoding(), strip, p_.square);
    });
  }

  // ---- one for each row, which is read once from memory

  void rows() {
    const int64_t chunk = std::max<int64_t>(1, kChunkBytes / (p_.k * element_size(element_)));
    torch::stable::parallel_for(0, p_.rows, row_grain(), [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += chunk) {
        const int64_t last = std::min(end, first + chunk);
        for (int64_t r = first; !encoder_.given() && r < last; ++r) {
          const uint32_t top = p_.signs
                                   ? kernels().rotated_amax[element_](m_, p_.signs, r * ks_, (r + 1) * ks_)
                                   : kernels().amax[element_](row_at(m_, element_, r), p_.k);
          encoder_.set_amax(r, bits_float(top));
        }
        kernels().encode[element_](m_, encoder_.encoding(), first * ks_, last * ks_);
      }
    });
  }

  void rows_of_columns() {
    for_strips(kStripRows, ks_, [&](const Strip& strip) {
      uint32_t tops[kStripRows];
      if (!encoder_.given()) {
        kernels().column_amax[element_](m_, p_.signs, strip, tops);
        for (int64_t r = 0; r < strip.rows; ++r) {
          encoder_.set_amax(strip.batch * m_.rows + strip.row + r, bits_float(tops[r]));
        }
      }
      kernels().encode_columns[element_](m_, encoder_.encoding(), strip, false);
    });
  }

  // ---- places

  int64_t row_grain() const { return std::max<int64_t>(1, kGrain / ks_); }

  // Parts of at most `rows` rows and `blocks` blocks of each.
  template <typename Body>
  void for_strips(int64_t rows, int64_t blocks, const Body& body) {
    const int64_t down = (m_.rows + rows - 1) / rows, across = (ks_ + blocks - 1) / blocks;
    const int64_t size = std::min(rows, m_.rows) * std::min(blocks, ks_);
    const int64_t grain = std::max<int64_t>(1, kGrain / size);
    torch::stable::parallel_for(0, m_.batches * down * across, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i / across % down * rows, block = i % across * blocks;
        body(Strip{i / across / down, row, std::min(rows, m_.rows - row), block, std::min(blocks, ks_ - block)});
      }
    });
  }

  const Params& p_;
  const Matrices m_;
  const Element element_;
  const int64_t ks_;
  Encoder encoder_;
};

Parts quantize(const Tensor& x, const std::optional<Tensor>& global_scale, const std::optional<Tensor>& hadamard,
               const std::optional<Tensor>& seed, const std::string& rounding, bool four_over_six,
               const std::string& metric, const std::string& block, bool per_row, const std::string& scale_layout) {
  Params p = check(x, global_scale, hadamard, seed, rounding, four_over_six, metric, block, per_row, scale_layout);
  const Parts parts = empty_parts(x, p);
  const Dense<float> given(global_scale), signs(hadamard);
  const Dense<int64_t> key(rounding == "stochastic" ? seed : std::nullopt);
  p.global_scale = given.data(), p.signs = signs.data(), p.seed = key.data();
  if (p.rows * p.k == 0) {
    Encoder(p).finish();
  } else {
    const Readable in(x);
    Quantizer(p, in.matrices(), element_of(x.scalar_type())).run();
  }
  return parts;
}

}  // namespace
}  // namespace n3::nvfp4_quantize

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("nvfp4_quantize", TORCH_BOX(&n3::nvfp4_quantize::quantize)); }
