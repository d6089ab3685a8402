#include "producers.h"

#include <algorithm>
#include <cmath>

#include <torch/csrc/stable/library.h>

#include "quantize_encoder.h"

#define N3_LANES 4  // the vectors every x86-64 and AArch64 has
#include "producers_lanes.h"

namespace n3::nvfp4_producers {

const Kernels kGenericKernels = kKernels;

namespace {

using nvfp4_quantize::Dense;
using nvfp4_quantize::Encoder;
using nvfp4_quantize::kGrain;
using nvfp4_quantize::Matrices;
using nvfp4_quantize::Maximum;
using nvfp4_quantize::Params;
using nvfp4_quantize::Parts;
using nvfp4_quantize::Readable;

constexpr int64_t kChunkBytes = 1 << 15;  // of y at a time, in L1 or L2
constexpr int64_t kKeptBytes = 1 << 20;   // of a y that stays in L2 and need not be made twice

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

// Rows that can be read where they lie, or a copy: their elements are side by side.
class Rows {
 public:
  explicit Rows(const Tensor& t) : in_(t), element_(element_of(t.scalar_type())) {
    if (in_.matrices().k_stride == 1 || t.numel() == 0) return;
    copy_ = torch::stable::contiguous(t);
    in_ = Readable(*copy_);
  }
  const void* at(int64_t r) const { return nvfp4_quantize::row_at(in_.matrices(), element_, r); }

 private:
  Readable in_;
  Element element_;
  std::optional<Tensor> copy_;
};

// Quantises rows that produce(row, y, again) writes to y, `again` for the second time. y [rows, k] is kept in `kept`,
// if that is not null.
template <typename Produce>
void quantize(const Params& p, Element element, void* kept, const Produce& produce) {
  Encoder encoder(p);
  if (p.rows * p.k == 0) return encoder.finish();
  const int64_t row_bytes = p.k * element_size(element), grain = std::max<int64_t>(1, kGrain / (p.k / 16));
  const int64_t chunk = std::max<int64_t>(1, kChunkBytes / row_bytes);
  const bool two_passes = !p.form.per_row && !encoder.given();
  Buffer<char> room;
  if (two_passes && !kept && p.rows * row_bytes <= kKeptBytes) {
    room = buffer<char>(p.rows * row_bytes);
    kept = room.get();
  }
  // body(first row, rows, y of them) over chunks of rows.
  const auto for_chunks = [&](bool make, bool again, const auto& body) {
    torch::stable::parallel_for(0, p.rows, grain, [&](int64_t begin, int64_t end) {
      const Buffer<char> scratch = kept ? nullptr : buffer<char>(chunk * row_bytes);
      for (int64_t first = begin; first < end; first += chunk) {
        const int64_t rows = std::min(end - first, chunk);
        char* y = kept ? static_cast<char*>(kept) + first * row_bytes : scratch.get();
        for (int64_t r = 0; make && r < rows; ++r) produce(first + r, y + r * row_bytes, again);
        body(first, rows, y);
      }
    });
  };
  if (two_passes) {
    Maximum top;
    for_chunks(true, false, [&](int64_t, int64_t rows, const char* y) {
      top.add(nvfp4_quantize::kernels().amax[element](y, rows * p.k));
    });
    encoder.set_amax(0, top.value());
  }
  for_chunks(!two_passes || !kept, two_passes, [&](int64_t first, int64_t rows, const char* y) {
    encoder.encode_rows(y, element, first, rows);
  });
  encoder.finish();
}

Parts relu2_nvfp4_quantize(const Tensor& x, const OptionalTensor& global_scale, bool four_over_six,
                           const std::string& metric, bool per_row, const std::string& scale_layout) {
  Params p = check_activation(relu2_op, 1, x, global_scale, four_over_six, metric, per_row, scale_layout);
  const Parts parts = nvfp4_quantize::empty_parts(x, p);
  const Dense<float> given(global_scale);
  p.global_scale = given.data();
  const Rows in(x);
  const Element element = element_of(x.scalar_type());
  const auto relu2 = kernels().relu2[element];
  quantize(p, element, nullptr, [&](int64_t r, void* y, bool) { relu2(in.at(r), y, p.k); });
  return parts;
}

Parts silu_mul_nvfp4_quantize(const Tensor& x, const OptionalTensor& global_scale, bool four_over_six,
                              const std::string& metric, bool per_row, const std::string& scale_layout) {
  Params p = check_activation(silu_mul_op, 2, x, global_scale, four_over_six, metric, per_row, scale_layout);
  const Parts parts = nvfp4_quantize::empty_parts(x, p);
  const Dense<float> given(global_scale);
  p.global_scale = given.data();
  const Rows in(x);
  const Element element = element_of(x.scalar_type());
  const auto silu_mul = kernels().silu_mul[element];
  quantize(p, element, nullptr, [&](int64_t r, void* y, bool) { silu_mul(in.at(r), y, p.k); });
  return parts;
}

std::vector<float> as_floats(const Tensor& t) {
  const Tensor dense = torch::stable::contiguous(t);
  const void* data = dense.const_data_ptr();
  const ScalarType type = t.scalar_type();  // once: asking costs more than a conversion
  std::vector<float> floats(t.numel());
  for (size_t i = 0; i < floats.size(); ++i) floats[i] = float_at(data, type, i);
  return floats;
}

using Normed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // q, block_scale, global_scale, y, residual_out

Normed rms_norm_nvfp4_quantize(const Tensor& x, const Tensor& weight, const OptionalTensor& residual,
                               const OptionalTensor& global_scale, double eps, bool four_over_six,
                               const std::string& metric, bool per_row, const std::string& scale_layout, bool keep) {
  Params p = check_rms_norm(x, weight, residual, global_scale, eps, four_over_six, metric, per_row, scale_layout);
  const auto [q, block_scale, global_out] = nvfp4_quantize::empty_parts(x, p);
  const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end()), nothing{0};
  const Tensor y = torch::stable::new_empty(x, keep ? shape : nothing);
  const Tensor total = torch::stable::new_empty(residual ? *residual : x, residual ? shape : nothing);
  const Dense<float> given(global_scale);
  p.global_scale = given.data();

  const Rows in(x), added(residual ? *residual : x);
  const Element element = element_of(x.scalar_type()), h_element = element_of(total.scalar_type());
  const int64_t total_bytes = p.k * element_size(h_element);
  const bool is_float = h_element == kFloat;
  const std::vector<float> weights = as_floats(weight);
  std::vector<float> rstd(p.rows);
  char* sums = residual ? static_cast<char*>(total.mutable_data_ptr()) : nullptr;
  const Kernels& k = kernels();
  quantize(p, element, keep ? y.mutable_data_ptr() : nullptr, [&](int64_t r, void* out, bool again) {
    const void* h = residual ? sums + r * total_bytes : in.at(r);
    if (!again) {
      if (residual) k.add[element][is_float](in.at(r), added.at(r), sums + r * total_bytes, p.k);
      rstd[r] = float(1. / std::sqrt(k.sum_of_squares[h_element](h, p.k) / double(p.k) + eps));
    }
    k.scale[element][is_float](h, rstd[r], weights.data(), out, p.k);
  });
  return {q, block_scale, global_out, y, total};
}

}  // namespace
}  // namespace n3::nvfp4_producers

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) {
  namespace producers = n3::nvfp4_producers;
  m.impl("relu2_nvfp4_quantize", TORCH_BOX(&producers::relu2_nvfp4_quantize));
  m.impl("silu_mul_nvfp4_quantize", TORCH_BOX(&producers::silu_mul_nvfp4_quantize));
  m.impl("rms_norm_nvfp4_quantize", TORCH_BOX(&producers::rms_norm_nvfp4_quantize));
}
