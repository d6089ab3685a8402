#define N3_LANES 8
#include "ssm_replay_lanes.h"

namespace n3::ssm_replay {
const Kernels kAvx2Kernels = {replay};
}
