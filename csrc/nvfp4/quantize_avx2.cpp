#define N3_LANES 8
#include "quantize_walk.h"

namespace n3::nvfp4_quantize {
const Kernels kAvx2Kernels = kKernels;
}
