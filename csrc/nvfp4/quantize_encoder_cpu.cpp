#include "quantize_encoder.h"

#include <cfloat>
#include <cmath>

#include "swizzle.h"

namespace n3::nvfp4_quantize {
namespace {

Global global_of(float s_enc, float amax) {
  s_enc = s_enc == 0.f ? 1.f : s_enc;
  return {s_enc, 1.f / s_enc, amax};
}

float normal(const Form& form) { return form.four_over_six ? 1536.f : 2688.f; }

}  // namespace

Global given_global(float scale, const Form& form) {
  const float s_enc = std::fmax(std::fmin(1.f / scale, FLT_MAX), -FLT_MAX);  // a subnormal's inverse is infinite
  return global_of(scale == 0.f ? 1.f : s_enc, scale * normal(form));
}

Encoder::Encoder(const Params& p) : p_(p), globals_(p.globals) {
  if (p.form.swizzled) linear_ = buffer<uint8_t>(p.rows * p.k / 16);
  encoding_ = {p.form, globals_.data(), p.signs, p.seed, p.q, p.form.swizzled ? linear_.get() : p.block_scale};
  for (int64_t i = 0; i < p.globals; ++i) {
    if (!p.global_scale) {
      set_amax(i, 0.f);
      continue;
    }
    globals_[i] = given_global(p.global_scale[i], p.form);
    p.global_out[i] = p.global_scale[i];
  }
}

void Encoder::set_amax(int64_t row, float amax) {
  globals_[row] = global_of(amax == 0.f ? 1.f : std::fmin(normal(p_.form) / amax, FLT_MAX), amax);
  p_.global_out[row] = globals_[row].inv;
}

void Encoder::encode_rows(const void* x, Element element, int64_t row, int64_t rows) {
  const int64_t ks = p_.k / 16, row_bytes = p_.k * element_size(element);
  for (int64_t r = 0; p_.form.per_row && !given() && r < rows; ++r) {
    const void* at = static_cast<const char*>(x) + r * row_bytes;
    set_amax(row + r, bits_float(kernels().amax[element](at, p_.k)));
  }
  Encoding e = encoding_;
  if (p_.form.per_row) e.globals += row;
  e.q += row * ks * 8, e.scale += row * ks;
  kernels().encode[element]({x, 1, rows, p_.k, 0, p_.k, 1}, e, 0, rows * ks);
}

void Encoder::finish() const {
  if (p_.form.swizzled) nvfp4_swizzle::swizzle_on_cpu({linear_.get(), p_.block_scale, 1, p_.rows, p_.k / 16});
}

}  // namespace n3::nvfp4_quantize
