// The scan of mamba2_prefill, whose operands and result are saturated float16.
#include "ssd_scan_sm90_launch.cuh"

namespace n3::ssd_scan {

void launch_mixed(const char* op, const Params& p, int device, cudaStream_t stream) {
  launch<mamba::Saturated>(op, p, true, device, stream);
}

}  // namespace n3::ssd_scan
