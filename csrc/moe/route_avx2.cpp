#define N3_LANES 8
#include "route_lanes.h"

namespace n3::moe_route {
const Kernels kAvx2Kernels = kKernels;
}
