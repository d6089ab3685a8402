#define N3_LANES 8
#include "ssd_scan_lanes.h"

namespace n3::ssd_scan {
const Kernels kAvx2Kernels = kKernels;
}
