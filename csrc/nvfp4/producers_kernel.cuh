// Quantising what another operator would have written: squared ReLU, SwiGLU, RMSNorm. What is quantised is rounded to
// the type of x first, so that the bytes are those of nvfp4_quantize.
#pragma once
#include "quantize_kernel.cuh"

namespace n3::nvfp4_producers {

using nvfp4_quantize::Args;
using nvfp4_quantize::Global;
using nvfp4_quantize::Rows;
using nvfp4_quantize::Tiles;
using nvfp4_quantize::kThreads;
using nvfp4_quantize::load_block;
using nvfp4_quantize::round_to;

// ---- activations: sources of nvfp4_quantize::rows_kernel and amax_kernel

struct Relu2 {
  static constexpr bool kTraining = false;
  static constexpr int kBlocks = 4;
  template <typename T>
  N3_DEVICE static void load(const Args& args, const T* row, int64_t c, float (&v)[16]) {
    load_block(row + c * 16, args.x.vectors, v);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float positive = v[i] < 0.f ? 0.f : v[i];  // NaN stays
      v[i] = positive * positive;
    }
    round_to<T>(v);
  }
};

// a / b for b between 1 and 2, to within the last place: a true division has branches for other divisors.
N3_DEVICE float over_small(float a, float b) {
#if defined(__CUDACC__)
  const float inverse = __fdividef(1.f, b), quotient = a * inverse;
  return fmaf(fmaf(-quotient, b, a), inverse, quotient);
#else
  return a / b;
#endif
}

// exp of -|a| cannot overflow; for negative a, silu = a e / (1 + e).
N3_DEVICE float silu(float a) {
  const float e = expf(-fabsf(a));
  return a * over_small(a < 0.f ? e : 1.f, 1.f + e);
}

// Of x = [a, b] with as many elements in each as in a row of the output.
struct SiluMul {
  static constexpr bool kTraining = false;
  static constexpr int kBlocks = 3;
  template <typename T>
  N3_DEVICE static void load(const Args& args, const T* row, int64_t c, float (&v)[16]) {
    float b[16];
    load_block(row + c * 16, args.x.vectors, v);
    load_block(row + (args.ks + c) * 16, args.x.vectors, b);
#pragma unroll
    for (int i = 0; i < 16; ++i) v[i] = silu(v[i]) * b[i];
    round_to<T>(v);
  }
};

// ---- RMSNorm

enum class Pass {
  kAll,     // the global scale is given, or one per row: rows are read once
  kMaxima,  // else first 1 / rms of each row and maxima of the tensor,
  kCodes,   // then codes
};

struct NormArgs {
  Rows residual;  // data null: none
  const void* weight;
  void *y, *residual_out;  // contiguous; null: not asked for
  float* rstd;             // [rows], between the two passes
  uint32_t* partial;       // of kMaxima: one per thread block
  double eps;
  bool wide_weight, wide_residual;  // float32 where x may be something else
  Pass pass;
};

// A block of a tensor that is float32 or has the type of x.
template <typename T>
N3_DEVICE void load_either(const void* data, int64_t at, bool wide, bool vectors, float (&v)[16]) {
  if (wide) return load_block(static_cast<const float*>(data) + at, vectors, v);
  load_block(static_cast<const T*>(data) + at, vectors, v);
}

template <typename T>
N3_DEVICE void store_either(void* data, int64_t at, bool wide, const float (&v)[16]) {
  if (wide) return device::store16(static_cast<float*>(data) + at, v);
  device::store16(static_cast<T*>(data) + at, v);
}

N3_DEVICE double shuffle_xor(double v, int offset) {
  uint32_t half[2];
  memcpy(half, &v, sizeof v);
#pragma unroll
  for (int i = 0; i < 2; ++i) half[i] = __shfl_xor_sync(0xffffffffu, half[i], offset);
  memcpy(&v, half, sizeof v);
  return v;
}

// The sum over aligned groups of 2^log threads, in every thread: neighbours last, warps in order. Called by all.
N3_DEVICE double group_sum(double v, int log) {
  __shared__ double of_warp[kThreads / 32];
  for (int offset = log < 5 ? (1 << log) / 2 : 16; offset; offset /= 2) v += shuffle_xor(v, offset);
  if (log <= 5) return v;
  const int warp = threadIdx.x / 32, warps = 1 << (log - 5);
  __syncthreads();  // the last call's sums have been read
  if (threadIdx.x % 32 == 0) of_warp[warp] = v;
  __syncthreads();
  double sum = 0.;
  for (int w = warp / warps * warps, end = w + warps; w < end; ++w) sum += of_warp[w];
  return sum;
}

// What is normalised: x, or x + residual rounded to the type of the residual.
template <typename T>
N3_DEVICE void load_sum(const Args& args, const NormArgs& n, int64_t row, int64_t c, float (&h)[16]) {
  load_block(static_cast<const T*>(args.x.data) + args.x.at(row) + c * 16, args.x.vectors, h);
  if (!n.residual.data) return;
  float r[16];
  load_either<T>(n.residual.data, n.residual.at(row) + c * 16, n.wide_residual, n.residual.vectors, r);
#pragma unroll
  for (int i = 0; i < 16; ++i) h[i] += r[i];
  if (!n.wide_residual) round_to<T>(h);
}

template <typename T>
N3_DEVICE void load_normed(const Args& args, const NormArgs& n, int64_t row, int64_t c, float rstd, float (&y)[16]) {
  load_sum<T>(args, n, row, c, y);
  float w[16];
  load_either<T>(n.weight, c * 16, n.wide_weight, true, w);
#pragma unroll
  for (int i = 0; i < 16; ++i) y[i] = y[i] * rstd * w[i];
  round_to<T>(y);
}

//   grid  tiles.blocks() (kMaxima: kMaxPartials at most), each going on by gridDim.x tiles     block kThreads
//   smem  some words per warp
// Tiles hold whole rows. A row is read from memory once per pass: it is summed, then normalised from L1, where its
// blocks are looked up again. Squares are summed in float64, whose order of summation does not show in 24 bits.
template <typename T>
__global__ __launch_bounds__(kThreads, 3) void norm_kernel(const Args args, const NormArgs n, const Tiles tiles) {
  Global tensor{};
  if (n.pass != Pass::kMaxima && !args.per_row) tensor = nvfp4_quantize::tensor_scale(args);
  const int log = tiles.log_width, width = 1 << log, x = threadIdx.x & (width - 1), y = threadIdx.x >> log;
  uint32_t top = 0;
  for (uint32_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const int64_t row = int64_t(tile) * tiles.height + y;
    const bool real = row < args.rows;
    float rstd = 0.f;
    if (n.pass == Pass::kCodes) {
      if (real) rstd = n.rstd[row];
    } else {
      double sum = 0.;
      for (int64_t c = x; real && c < args.ks; c += width) {
        float h[16];
        load_sum<T>(args, n, row, c, h);
        if (n.residual_out) store_either<T>(n.residual_out, (row * args.ks + c) * 16, n.wide_residual, h);
#pragma unroll
        for (int i = 0; i < 16; ++i) sum += double(h[i]) * double(h[i]);
      }
      rstd = float(1. / sqrt(group_sum(sum, log) / double(args.ks * 16) + n.eps));
    }
    if (n.pass == Pass::kMaxima) {
      if (real && x == 0) n.rstd[row] = rstd;
      for (int64_t c = x; real && c < args.ks; c += width) {
        float v[16];
        load_normed<T>(args, n, row, c, rstd, v);
        top = max(top, nvfp4_quantize::finite_max(v));
      }
      continue;
    }
    nvfp4_quantize::quantize_row(args, nullptr, tensor, row, x, width, log, [&](int64_t c, float(&v)[16]) {
      load_normed<T>(args, n, row, c, rstd, v);
      if (n.y) device::store16(static_cast<T*>(n.y) + (row * args.ks + c) * 16, v);
    });
  }
  if (n.pass != Pass::kMaxima) return;
  top = device::block_max<kThreads>(top);
  if (threadIdx.x == 0) n.partial[blockIdx.x] = top;
}

}  // namespace n3::nvfp4_producers
