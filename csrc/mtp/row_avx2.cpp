#define N3_LANES 8
#include "row_lanes.h"

namespace n3::mtp {
const Kernels kAvx2Kernels = kKernels;
}
