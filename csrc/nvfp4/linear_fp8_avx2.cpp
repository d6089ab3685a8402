#define N3_LANES 8
#include "linear_fp8_lanes.h"

namespace n3::nvfp4_linear::fp8 {
const Kernels kAvx2Kernels = kKernels;
}
