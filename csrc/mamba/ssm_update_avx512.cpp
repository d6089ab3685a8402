#define N3_LANES 16
#include "ssm_update_lanes.h"

namespace n3::ssm_update {
const Kernels kAvx512Kernels = {update};
}
