// The quantisers under the emulator, with C entries for tests/nvfp4/test_cuda_quantize.py. The launches are those of a
// GPU, in their order.
#include "cuda_emulator.h"

#include "nvfp4/producers_run.cuh"
#include "nvfp4/quantize_run.cuh"

namespace {

using n3::device::BF16;
using n3::device::F16;
namespace producers = n3::nvfp4_producers;
namespace quantize = n3::nvfp4_quantize;

// Calls f with a null pointer of the element type: 0 float32, 1 float16, 2 bfloat16.
template <typename F>
void with_type(int dtype, F f) {
  if (dtype == 0) return f(static_cast<float*>(nullptr));
  if (dtype == 1) return f(static_cast<F16*>(nullptr));
  return f(static_cast<BF16*>(nullptr));
}

// Mirrored by ctypes in the test.
struct Matrices {
  const void* data;
  int64_t batches, rows, batch_stride, row_stride;
};

struct Problem {
  Matrices x;
  int64_t k_stride, rows, k;
  uint8_t *q, *block_scale;
  float* global_out;
  const float *given, *signs;
  const int64_t* seed;
  uint32_t limit;  // thread blocks of a launch
  bool four_over_six, mse, per_row, swizzled, square;
};

struct Norm {
  Matrices residual;
  const void* weight;
  void *y, *residual_out;
  double eps;
  bool wide_weight, wide_residual;
};

quantize::Rows rows_of(const Matrices& m, int64_t k_stride, int64_t element) {
  return quantize::rows_at(m.data, m.batches, m.rows, m.batch_stride, m.row_stride, k_stride, element);
}

quantize::Args args_of(const Problem& p, int64_t element) {
  quantize::Args args{};
  args.x = rows_of(p.x, p.k_stride, element);
  args.k_stride = p.k_stride, args.rows = p.rows, args.ks = p.k / 16;
  args.q = p.q, args.block_scale = p.block_scale, args.global_out = p.global_out;
  args.given = p.given, args.signs = p.signs, args.seed = p.seed;
  args.four_over_six = p.four_over_six, args.mse = p.mse, args.per_row = p.per_row;
  args.swizzled = p.swizzled, args.square = p.square;
  return args;
}

// What csrc/nvfp4/quantize_launch.cuh has for a GPU.
struct Launcher {
  bool reversed;
  uint32_t limit;

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), uint32_t blocks, const Arguments&... arguments) const {
    emulator::launch(blocks, quantize::kThreads, reversed, [&] { kernel(arguments...); });
  }
};

}  // namespace

extern "C" {

// Eight codes of each eight floats, by the quantisers' arithmetic.
void emulate_codes(const float* v, uint32_t* words, int64_t count) {
  for (int64_t i = 0; i < count; ++i) words[i] = quantize::nearest_codes(v + 8 * i);
}

// t / 1536 and the magnitude that a code stands for, of floats.
void emulate_over_1536(const float* t, float* y, int64_t count, bool fast) {
  for (int64_t i = 0; i < count; ++i) y[i] = fast ? quantize::over_1536<true>(t[i]) : quantize::over_1536<false>(t[i]);
}
void emulate_nearest_value(const float* v, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = quantize::nearest_value(v[i]);
}

void emulate_quantize(int dtype, const Problem* problem, bool reversed) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const quantize::Args args = args_of(*problem, sizeof(T));
    std::vector<uint32_t> memory(quantize::words_of(args), ~0u);  // nothing is read that was not written
    quantize::run<T>(args, memory.data(), Launcher{reversed, problem->limit});
  });
}

// `producer`: 0 relu2, 1 silu_mul, 2 rms_norm.
void emulate_producer(int dtype, int producer, const Problem* problem, const Norm* norm, bool reversed) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const quantize::Args args = args_of(*problem, sizeof(T));
    std::vector<uint32_t> memory(producers::words_of(args, producer == 2), ~0u);
    const Launcher launcher{reversed, problem->limit};
    if (producer == 0) return producers::run_activation<T, producers::Relu2>(args, memory.data(), launcher);
    if (producer == 1) return producers::run_activation<T, producers::SiluMul>(args, memory.data(), launcher);
    producers::NormArgs n{};
    if (norm->residual.data) n.residual = rows_of(norm->residual, 1, norm->wide_residual ? 4 : sizeof(T));
    n.weight = norm->weight, n.y = norm->y, n.residual_out = norm->residual_out, n.eps = norm->eps;
    n.wide_weight = norm->wide_weight, n.wide_residual = norm->wide_residual;
    producers::run_norm<T>(args, n, memory.data(), launcher);
  });
}

}  // extern "C"
