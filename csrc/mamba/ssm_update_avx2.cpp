#define N3_LANES 8
#include "ssm_update_lanes.h"

namespace n3::ssm_update {
const Kernels kAvx2Kernels = {update};
}
