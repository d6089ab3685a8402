#define N3_LANES 8
#include "dense_lanes.h"

namespace n3::dense_linear {
const Kernels kAvx2Kernels = kKernels;
}
