#define N3_LANES 16
#include "experts_bwd_lanes.h"

namespace n3::moe_bwd {
const Kernels kAvx512Kernels = kKernels;
}
