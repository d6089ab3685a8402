// The products of grouped_linear on sm_90a, for the launchers of grouped_linear and moe_experts.
#pragma once
#include <cuda_runtime.h>

#include "grouped_activation.h"
#include "grouped_plan.h"
#include "nvfp4_operands.h"

namespace n3::grouped_linear::sm90 {

struct Product {
  const Tensor& x;  // [m, k], float16 or bfloat16; for NVFP4 weights in_order, [m, k up to a multiple of 128]
  Activation activation;
  int64_t rows;            // of the result, at least 1
  const int32_t* offsets;  // [groups + 1]
  const int32_t* gather;   // [rows] or null
  int32_t sharing;         // row r takes row gather[r] / sharing
  const float* row_scale;  // [rows] or null, kRows alone
  To to;                   // all but kRows: bfloat16 x, and rows of no group stay as they are; kSlots: not gated
  const int32_t* targets;  // kSlots: [rows], the rows of y
  void* y;                 // [rows, outputs] of x's type; kSlots: float32; kOrdered, of NVFP4 weights alone: in order
};

// What the copy engine reads: rows that begin at multiples of 16 bytes.
bool in_rows(const Tensor& w);

// `op` is whom errors are reported for.
void multiply(const char* op, const Product& product, const Tensor& w, cudaStream_t stream);
void multiply(const char* op, const Product& product, const moe_experts::sm90::nvfp4::PackedWeights& w,
              cudaStream_t stream);

inline int multiprocessors(const char* op, const Tensor& t) {
  int count;
  N3_CUDA_CHECK(op, cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.get_device_index()));
  return count;
}

}  // namespace n3::grouped_linear::sm90
