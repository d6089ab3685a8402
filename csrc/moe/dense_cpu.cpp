// The products with dense weights on any CPU, and the choice among the instruction sets.
#define N3_LANES 4
#include "dense_amx.h"
#include "dense_lanes.h"

namespace n3::dense_linear {

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

const amx::Kernels* tile_kernels() {
#if defined(__x86_64__)
  if (cpu_isa() == Isa::kAmx) return &amx::kKernels;
#endif
  return nullptr;
}

}  // namespace n3::dense_linear
