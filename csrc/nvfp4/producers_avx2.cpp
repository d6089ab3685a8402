#define N3_LANES 8
#include "producers_lanes.h"

namespace n3::nvfp4_producers {
const Kernels kAvx2Kernels = kKernels;
}
