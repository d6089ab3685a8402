#define N3_LANES 8
#include "experts_bwd_lanes.h"

namespace n3::moe_bwd {
const Kernels kAvx2Kernels = kKernels;
}
