// The CPU products of NVFP4 matrices, for nvfp4_gemm and nvfp4_grouped_gemm.
#pragma once
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "gemm.h"
#include "linear_amx.h"

namespace n3::nvfp4_gemm {

// Keeps contiguous forms of an operand's tensors alive and puts their pointers into its matrix.
struct Operand {
  Tensor q, scale, global;
  Operand(const Tensor& codes, const Tensor& scales, const Tensor& globals, Matrix& matrix)
      : q(torch::stable::contiguous(codes)),
        scale(torch::stable::contiguous(scales)),
        global(torch::stable::contiguous(globals)) {
    matrix.q = static_cast<const uint8_t*>(q.const_data_ptr());
    matrix.scale = static_cast<const uint8_t*>(scale.const_data_ptr());
    matrix.global = static_cast<const float*>(global.const_data_ptr());
  }
};

// Rows first ... first + tokens of a, which meet one matrix of b.
struct Segment {
  int64_t first, tokens, expert;
};

// Writes the rows of y that the segments name.
void multiply(const Params& p, const std::vector<Segment>& segments);

// The same in AMX tiles, which have bits of their own.
void multiply_tiles(const Params& p, const std::vector<Segment>& segments, const nvfp4_linear::amx::Kernels& kernel);

}  // namespace n3::nvfp4_gemm
