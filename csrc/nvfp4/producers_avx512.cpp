#define N3_LANES 16
#include "producers_lanes.h"

namespace n3::nvfp4_producers {
const Kernels kAvx512Kernels = kKernels;
}
