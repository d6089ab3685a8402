// How rows are quantised and where they are read: plain data, no torch.
#pragma once
#include <cstdint>

namespace n3::nvfp4_quantize {

// What every quantiser can be asked for: nvfp4_quantize and the fused producers of producers.h.
struct Form {
  bool four_over_six, mse, per_row, swizzled;
};

// `batches` matrices [rows, k], read where they lie. Strides are in elements; that of k or that of a row is 1 (x.mT).
struct Matrices {
  const void* data;
  int64_t batches, rows, k;
  int64_t batch_stride, row_stride, k_stride;
};

}  // namespace n3::nvfp4_quantize
