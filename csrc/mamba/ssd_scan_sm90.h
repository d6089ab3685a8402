// What ssd_scan's sm_90 kernel takes, and its launch for mamba2_prefill.
#pragma once
#include "../common/cuda.h"
#include "ssd_scan.h"

namespace n3::ssd_scan {

// Why the kernel does not take a call, or null; n3kernels/mamba/_supports.py asks first, in the same words. Operands
// that are not there yet, whose data is null, are taken to be right.
const char* unsupported(const Params& p);

// x, B, C and y are mamba::Saturated, dtype float16. Begins before the kernels before it end. Compiled once, in
// ssd_scan_mixed_sm90.cu.
void launch_mixed(const char* op, const Params& p, int device, cudaStream_t stream);

}  // namespace n3::ssd_scan
