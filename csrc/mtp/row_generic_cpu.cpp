#include "../common/cpu.h"

#define N3_LANES 4  // the vectors every x86-64 and AArch64 has
#include "row_lanes.h"

namespace n3::mtp {

const Kernels kGenericKernels = kKernels;

const Kernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::kAmx:
    case Isa::kAvx512: return kAvx512Kernels;
    case Isa::kAvx2: return kAvx2Kernels;
    case Isa::kGeneric: break;
  }
#endif
  return kGenericKernels;
}

}  // namespace n3::mtp
