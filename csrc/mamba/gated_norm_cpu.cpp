#include "gated_norm.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/element.h"

#define N3_LANES 4  // the vectors every x86-64 and AArch64 has
#include "gated_norm_lanes.h"

namespace n3::gated_norm {

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

}  // namespace n3::gated_norm

namespace {

namespace norm = n3::gated_norm;
using n3::Tensor;
using n3::Element;
using n3::element_of;
using n3::element_size;
using n3::mamba::Operand;
using n3::mamba::OptionalTensor;

constexpr int64_t kGrain = 1 << 14;      // elements of a thread at least: some 10 us
constexpr int64_t kBlockRows = 32;       // rows whose dweight is summed by one thread, at least
constexpr int64_t kBlocks = 128;         // and so many such sums at most: dweight of 1M rows keeps 128 rows of floats

// Tensors whose rows can be read in place, their elements side by side; else copies that live as long as this does.
class Inputs {
 public:
  void use(Operand& o, const OptionalTensor& t) {
    if (!t || (o.data && o.strides[1] == 1)) return;
    copies_.push_back(torch::stable::contiguous(*t));
    o = norm::rows_of(copies_.back());
  }

  // weight as contiguous floats.
  const float* weight(const Operand& w, int64_t dim) {
    if (w.dtype == n3::ScalarType::Float && w.strides[0] == 1) return static_cast<const float*>(w.data);
    weight_.resize(dim);
    for (int64_t i = 0; i < dim; ++i) weight_[i] = n3::float_at(w.data, w.dtype, i * w.strides[0]);
    return weight_.data();
  }

 private:
  std::vector<Tensor> copies_;
  std::vector<float> weight_;
};

template <typename Void>
Void* offset(Void* data, int64_t elements, int64_t size) {
  using Byte = std::conditional_t<std::is_const_v<Void>, const char, char>;
  return data ? static_cast<Byte*>(data) + elements * size : nullptr;
}

Tensor gated_rms_norm(const Tensor& x, const OptionalTensor& z, const Tensor& weight, int64_t group_size, double eps,
                      bool norm_before_gate) {
  norm::Params p = norm::check(x, z, weight, group_size, eps, norm_before_gate);
  const Tensor y = torch::stable::new_empty(x, std::vector<int64_t>(x.sizes().begin(), x.sizes().end()));
  if (p.rows == 0) return y;
  Inputs inputs;
  inputs.use(p.x, x), inputs.use(p.z, z);
  const float* w = inputs.weight(p.weight, p.dim);
  p.y = y.mutable_data_ptr();
  const int64_t size = element_size(p.x.dtype);
  const auto forward = norm::kernels().forward[element_of(p.x.dtype)];
  torch::stable::parallel_for(0, p.rows, std::max<int64_t>(1, kGrain / p.dim), [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(norm::scratch_floats(p.group_size));
    for (int64_t r = begin; r < end; ++r) {
      forward({offset(p.x.data, r * p.x.strides[0], size), offset(p.z.data, r * p.z.strides[0], size), w,
               offset(p.y, r * p.dim, size), scratch.data(), p.dim / p.group_size, p.group_size, p.eps,
               p.norm_before_gate});
    }
  });
  return y;
}

// dweight of one block of rows for each group: a thread owns an item, so its sums do not depend on the threads.
void backward_blocks(const norm::BackwardParams& b, const float* w, int64_t block_rows, float* partial) {
  const norm::Params& p = b.forward;
  const int64_t groups = p.dim / p.group_size, blocks = (p.rows + block_rows - 1) / block_rows;
  const int64_t size = element_size(p.x.dtype);
  const auto backward = norm::kernels().backward[element_of(p.x.dtype)];
  torch::stable::parallel_for(0, blocks * groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(norm::scratch_floats(p.group_size));
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / groups, at = item % groups * p.group_size;
      const int64_t last = std::min(p.rows, (block + 1) * block_rows);
      float* dweight = partial + block * p.dim + at;
      std::fill_n(dweight, p.group_size, 0.f);
      for (int64_t r = block * block_rows; r < last; ++r) {
        backward({offset(b.grad_y.data, r * b.grad_y.strides[0] + at, size),
                  offset(p.x.data, r * p.x.strides[0] + at, size), offset(p.z.data, r * p.z.strides[0] + at, size),
                  w + at, offset(b.dx, r * p.dim + at, size), offset(b.dz, r * p.dim + at, size), dweight,
                  scratch.data(), p.group_size, p.eps, p.norm_before_gate});
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> gated_rms_norm_bwd(const Tensor& grad_y, const Tensor& x, const OptionalTensor& z,
                                                      const Tensor& weight, int64_t group_size, double eps,
                                                      bool norm_before_gate) {
  norm::BackwardParams b = norm::check_bwd(grad_y, x, z, weight, group_size, eps, norm_before_gate);
  norm::Params& p = b.forward;
  const std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const Tensor dx = torch::stable::new_empty(x, shape);
  const Tensor dz = torch::stable::new_empty(x, z ? shape : std::vector<int64_t>{0});
  const Tensor dweight = torch::stable::new_empty(weight, std::vector<int64_t>{p.dim});
  Inputs inputs;
  inputs.use(p.x, x), inputs.use(p.z, z), inputs.use(b.grad_y, grad_y);
  b.dx = dx.mutable_data_ptr(), b.dz = z ? dz.mutable_data_ptr() : nullptr, b.dweight = dweight.mutable_data_ptr();

  const int64_t block_rows = std::max(kBlockRows, (p.rows + kBlocks - 1) / kBlocks);
  const int64_t blocks = (p.rows + block_rows - 1) / block_rows;
  std::vector<float> partial(blocks * p.dim);
  if (p.rows > 0) backward_blocks(b, inputs.weight(p.weight, p.dim), block_rows, partial.data());
  torch::stable::parallel_for(0, p.dim, 1024, [&](int64_t begin, int64_t end) {
    std::vector<double> sum(end - begin);
    for (int64_t k = 0; k < blocks; ++k) {
      for (int64_t i = begin; i < end; ++i) sum[i - begin] += partial[k * p.dim + i];
    }
    for (int64_t i = begin; i < end; ++i) {
      n3::set_element(b.dweight, p.weight.dtype, i, float(sum[i - begin]));
    }
  });
  return {dx, dz, dweight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) {
  m.impl("gated_rms_norm", TORCH_BOX(&gated_rms_norm));
  m.impl("gated_rms_norm_bwd", TORCH_BOX(&gated_rms_norm_bwd));
}
