#define N3_LANES 16
#include "gated_norm_lanes.h"

namespace n3::gated_norm {
const Kernels kAvx512Kernels = kKernels;
}
