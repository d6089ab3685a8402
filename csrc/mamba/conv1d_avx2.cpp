#define N3_LANES 8
#include "conv1d_lanes.h"

namespace n3::causal_conv1d {
const Kernels kAvx2Kernels = kKernels;
}
