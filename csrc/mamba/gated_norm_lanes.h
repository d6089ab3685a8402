// The gated norm of one row, compiled once per instruction set by a file that defines N3_LANES. Two passes over a
// group, which stays in the L1 cache: the first gates and sums squares, the second scales.
#pragma once
#include <cmath>
#include <cstring>

#include "../common/lanes.h"
#include "gated_norm_kernels.h"

namespace n3::gated_norm {
namespace {

constexpr int kVectors = kSums / kLanes;

enum Gate { kNone, kBeforeNorm, kAfterNorm };

// The kSums partial sums of a group; added up in one order on every instruction set.
struct Sums {
  F32 v[kVectors] = {};

  float total() const {
    F32 sum[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) sum[i] = v[i];
#pragma GCC unroll 8
    for (int half = kVectors / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) sum[i] += sum[i + half];
    }
    float s[kLanes];
    store(s, sum[0]);
#pragma GCC unroll 8
    for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
      for (int i = 0; i < half; ++i) s[i] += s[i + half];
    }
    return s[0];
  }
};

// kSums elements at p + i of n, or a copy of the last ones padded with zeros.
template <typename T>
class In {
 public:
  In(const void* p, int64_t n) : p_(static_cast<const T*>(p)), n_(n) {}
  N3_LANE_FN const T* at(int64_t i) {
    if (i + kSums <= n_) return p_ + i;
    std::memset(copy_, 0, sizeof copy_);
    std::memcpy(copy_, p_ + i, (n_ - i) * sizeof(T));
    return copy_;
  }

 private:
  const T* p_;
  int64_t n_;
  T copy_[kSums];
};

// The same for results: write at at(i), then done(i).
template <typename T>
class Out {
 public:
  Out(void* p, int64_t n) : p_(static_cast<T*>(p)), n_(n) {}
  N3_LANE_FN T* at(int64_t i) { return i + kSums <= n_ ? p_ + i : copy_; }
  N3_LANE_FN void done(int64_t i) {
    if (i + kSums > n_) std::memcpy(p_ + i, copy_, (n_ - i) * sizeof(T));
  }

 private:
  T* p_;
  int64_t n_;
  T copy_[kSums];
};

template <typename T>
N3_LANE_FN void prefetch(const T* p) {  // kSums elements
  for (size_t byte = 0; byte < kSums * sizeof(T); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte);
  }
}

float inverse_rms(float sum_of_squares, int64_t n, float eps) {
  return 1.f / std::sqrt(sum_of_squares / float(n) + eps);
}

template <typename X, typename T, Gate kGate>
void forward_group(const void* x_data, const void* z_data, const void* next_z, const float* weight, void* y_data,
                   float* scratch, int64_t n, float eps) {
  In<X> x_in(x_data, n);
  In<T> z_in(z_data, n);
  In<float> w_in(weight, n);
  Out<T> y_out(y_data, n);
  Sums squares;
  for (int64_t i = 0; i < n; i += kSums) {
    const X* x = x_in.at(i);
    const T* z = kGate == kNone ? nullptr : z_in.at(i);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      F32 h = load(x + v * kLanes);
      if constexpr (kGate == kBeforeNorm) h = h * silu(load(z + v * kLanes));
      squares.v[v] = fma(h, h, squares.v[v]);
      if constexpr (kGate == kBeforeNorm) store(scratch + i + v * kLanes, h);
    }
  }
  const float rstd = inverse_rms(squares.total(), n, eps);
  for (int64_t i = 0; i < n; i += kSums) {
    const X* x = kGate == kBeforeNorm ? nullptr : x_in.at(i);
    const T* z = kGate == kAfterNorm ? z_in.at(i) : nullptr;
    const float* w = w_in.at(i);
    T* y = y_out.at(i);
    // The next group, whose first pass would wait for memory, while this one computes; its x lies behind this one's.
    prefetch(static_cast<const X*>(x_data) + n + i);
    if constexpr (kGate != kNone) prefetch(static_cast<const T*>(next_z) + i);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      F32 h;
      if constexpr (kGate == kBeforeNorm) {
        h = load(scratch + i + v * kLanes);
      } else {
        h = load(x + v * kLanes);
      }
      h = h * rstd * load(w + v * kLanes);
      if constexpr (kGate == kAfterNorm) h = h * silu(load(z + v * kLanes));
      store(y + v * kLanes, h);
    }
    y_out.done(i);
  }
}

template <typename X, typename T>
void forward(const Row& row) {
  const auto group = !row.z                 ? forward_group<X, T, kNone>
                     : row.norm_before_gate ? forward_group<X, T, kAfterNorm>
                                            : forward_group<X, T, kBeforeNorm>;
  for (int64_t g = 0; g < row.groups; ++g) {
    const int64_t at = g * row.group_size;
    const T* z = row.z ? static_cast<const T*>(row.z) + at : nullptr;
    const bool last = row.next_z && g + 1 == row.groups;
    const void* next_z = !z || last ? row.next_z : z + row.group_size;
    group(static_cast<const X*>(row.x) + at, z, next_z, row.weight + at, static_cast<T*>(row.y) + at, row.scratch,
          row.group_size, row.eps);
  }
}

// What both passes of the backward derive from the inputs.
struct Point {
  F32 x, dy, w, z, sigmoid, gate;  // gate = z * sigmoid

  template <Gate kGate>
  N3_LANE_FN F32 h() const {  // what is normalised
    return kGate == kBeforeNorm ? x * gate : x;
  }
  template <Gate kGate>
  N3_LANE_FN F32 g() const {  // gradient with respect to the normalised
    return kGate == kAfterNorm ? dy * w * gate : dy * w;
  }
};

template <typename T, Gate kGate>
void backward_group(const BackwardRow& row) {
  const int64_t n = row.group_size;
  In<T> x_in(row.x, n), dy_in(row.grad_y, n), z_in(row.z, n);
  In<float> w_in(row.weight, n);
  const auto point = [&](const T* x, const T* dy, const T* z, const float* w, int at) __attribute__((always_inline)) {
    Point p{load(x + at), load(dy + at), load(w + at), {}, {}, {}};
    if constexpr (kGate != kNone) p.z = load(z + at);
    return p;
  };
  Sums squares, products;
  for (int64_t i = 0; i < n; i += kSums) {
    const T *x = x_in.at(i), *dy = dy_in.at(i), *z = kGate == kNone ? nullptr : z_in.at(i);
    const float* w = w_in.at(i);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      Point p = point(x, dy, z, w, v * kLanes);
      if constexpr (kGate != kNone) {
        p.sigmoid = sigmoid(p.z);
        p.gate = p.z * p.sigmoid;
        store(row.scratch + i + v * kLanes, p.sigmoid);
      }
      const F32 h = p.h<kGate>();
      squares.v[v] = fma(h, h, squares.v[v]);
      products.v[v] = fma(p.g<kGate>(), h, products.v[v]);
    }
  }
  const float rstd = inverse_rms(squares.total(), n, row.eps);
  const float mean = products.total() / float(n) * rstd;
  Out<T> dx_out(row.dx, n), dz_out(row.dz, n);
  In<float> dw_in(row.dweight, n);
  Out<float> dw_out(row.dweight, n);
  for (int64_t i = 0; i < n; i += kSums) {
    const T *x = x_in.at(i), *dy = dy_in.at(i), *z = kGate == kNone ? nullptr : z_in.at(i);
    const float *w = w_in.at(i), *dw_before = dw_in.at(i);
    T *dx = dx_out.at(i), *dz = dz_out.at(i);
    float* dw = dw_out.at(i);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int at = v * kLanes;
      Point p = point(x, dy, z, w, at);
      F32 slope{};  // silu'(z)
      if constexpr (kGate != kNone) {
        p.sigmoid = load(row.scratch + i + at);
        p.gate = p.z * p.sigmoid;
        slope = p.sigmoid * fma(p.z, 1.f - p.sigmoid, splat(1.f));
      }
      const F32 normed = p.h<kGate>() * rstd;
      const F32 dh = rstd * (p.g<kGate>() - normed * mean);
      store(dx + at, kGate == kBeforeNorm ? dh * p.gate : dh);
      if constexpr (kGate == kBeforeNorm) store(dz + at, dh * p.x * slope);
      if constexpr (kGate == kAfterNorm) store(dz + at, p.dy * normed * p.w * slope);
      store(dw + at, fma(p.dy, kGate == kAfterNorm ? normed * p.gate : normed, load(dw_before + at)));
    }
    dx_out.done(i);
    if constexpr (kGate != kNone) dz_out.done(i);
    dw_out.done(i);
  }
}

template <typename T>
void backward(const BackwardRow& row) {
  if (!row.z) return backward_group<T, kNone>(row);
  if (row.norm_before_gate) return backward_group<T, kAfterNorm>(row);
  return backward_group<T, kBeforeNorm>(row);
}

constexpr Kernels kKernels = {{forward<float, float>, forward<Half, Half>, forward<BFloat16, BFloat16>},
                              {forward<float, float>, forward<float, Half>, forward<float, BFloat16>},
                              {backward<float>, backward<Half>, backward<BFloat16>}};

}  // namespace
}  // namespace n3::gated_norm
