#define N3_LANES 16
#include "quantize_walk.h"

namespace n3::nvfp4_quantize {
const Kernels kAvx512Kernels = kKernels;
}
