#define N3_LANES 16
#include "dense_lanes.h"

namespace n3::dense_linear {
const Kernels kAvx512Kernels = kKernels;
}
