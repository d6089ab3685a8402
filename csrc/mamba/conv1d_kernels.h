// What the convolution's CPU files and the fused mixer ask of each instruction set; all give the same bits. Vectors run
// over channels. A row is the inputs of one token, channels side by side; rows are given by pointers, so that a window
// may begin in a state, go on in a matrix of any row stride and follow the branches of a tree. Formulas in conv1d.h.
#pragma once
#include <cstdint>

namespace n3::causal_conv1d {

// y[t] = act(bias + sum_k weight[k] * x[t + k]).
struct Fir {
  const void* const* x;  // tokens + width - 1 rows, oldest first
  const float* weight;   // tap k at weight + k * tap_stride
  const float* bias;     // zeros where there is none
  void* y;               // row t at y + t * y_stride elements; not among x
  int64_t tokens, channels, width, tap_stride, y_stride;
  bool silu;
};

// dpre[t] = grad_y[t] * act'(pre), and the sums over these tokens are added to dweight: dpre[t] * x[t + k] to row k,
// dpre[t] to row `width`.
struct Slope {
  const void *const *x, *const *grad_y;  // tokens + width - 1 rows; tokens rows
  const float *weight, *bias;            // as above
  float* const* dpre;
  float* dweight;  // row k at dweight + k * tap_stride
  int64_t tokens, channels, width, tap_stride;
  bool silu;
};

// `inputs` values of each channel at strides of elements, as in a state.
struct Columns {
  void* data;
  int64_t channels, inputs, channel_stride, input_stride;
};

// Indexed by Element, but gather and scatter: 0 for elements of 4 bytes, 1 for 2; they copy bits.
struct Kernels {
  void (*fir[3])(const Fir&);             // x and y of that type
  void (*fir_to_float[3])(const Fir&);    // x of that type, y float: the mixer's
  void (*fir_from_float[3])(const Fir&);  // x float, y of that type
  void (*slope[3])(const Slope&);
  void (*to_float[3])(const void* from, float* to, int64_t n);
  void (*gather[2])(const Columns& from, void* rows, int64_t row_stride);  // input i becomes row i
  void (*scatter[2])(const void* const* rows, const Columns& to);
};

extern const Kernels kGenericKernels, kAvx2Kernels, kAvx512Kernels;

const Kernels& kernels();  // those of n3::cpu_isa()

}  // namespace n3::causal_conv1d
