#define N3_LANES 8
#include "gated_norm_lanes.h"

namespace n3::gated_norm {
const Kernels kAvx2Kernels = kKernels;
}
