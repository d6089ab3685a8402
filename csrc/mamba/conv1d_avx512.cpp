#define N3_LANES 16
#include "conv1d_lanes.h"

namespace n3::causal_conv1d {
const Kernels kAvx512Kernels = kKernels;
}
