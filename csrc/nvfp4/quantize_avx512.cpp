#define N3_LANES 16
#include "quantize_lanes.h"

namespace n3::nvfp4_quantize {
const Kernels kAvx512Kernels = {amax, encode};
}
