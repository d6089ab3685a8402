#define N3_LANES 16
#include "ssd_scan_lanes.h"

namespace n3::ssd_scan {
const Kernels kAvx512Kernels = kKernels;
}
