#define N3_LANES 16
#include "row_lanes.h"

namespace n3::mtp {
const Kernels kAvx512Kernels = kKernels;
}
