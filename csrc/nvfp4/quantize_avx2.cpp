#define N3_LANES 8
#include "quantize_lanes.h"

namespace n3::nvfp4_quantize {
const Kernels kAvx2Kernels = {amax, encode};
}
