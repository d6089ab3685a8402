#define N3_LANES 16
#include "ssm_replay_lanes.h"

namespace n3::ssm_replay {
const Kernels kAvx512Kernels = {replay};
}
