#define N3_LANES 16
#include "ssd_scan_bwd_lanes.h"

namespace n3::ssd_scan_bwd {
const Kernels kAvx512Kernels = kBackwardKernels;
}
