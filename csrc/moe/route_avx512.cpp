#define N3_LANES 16
#include "route_lanes.h"

namespace n3::moe_route {
const Kernels kAvx512Kernels = kKernels;
}
