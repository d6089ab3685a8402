// nvfp4_grouped_gemm's preparation under the emulator, and its plan, with C entries for
// tests/nvfp4/test_gemm_cuda_args.py.
#include "cuda_emulator.h"

#include "nvfp4/grouped_gemm_prepare.cuh"

namespace {

namespace gemm = n3::nvfp4_gemm;
namespace grouped = n3::nvfp4_grouped_gemm;

}  // namespace

extern "C" {

const char* gemm_unsupported(int64_t m, int64_t n, int64_t k, int out, bool a_swizzled, bool b_swizzled) {
  return gemm::unsupported(m, n, k, gemm::Out(out), a_swizzled, b_swizzled);
}

const char* grouped_unsupported(int64_t m, int64_t n, int64_t k, int64_t experts, int out, bool b_swizzled) {
  return grouped::unsupported(m, n, k, experts, gemm::Out(out), b_swizzled);
}

int gemm_tile(int64_t m, int64_t n, int sms, bool invariant) { return int(gemm::tile(m, n, sms, invariant)); }

int64_t grouped_scale_bytes(int64_t m, int64_t k, int64_t experts) { return grouped::scale_bytes(m, k, experts); }

// Bytes of the arrays; with memory, the address of each in `where`, in the order of grouped::Arrays.
int64_t grouped_place(char* memory, int64_t experts, void** where) {
  grouped::Arrays arrays;
  const int64_t bytes = int64_t(grouped::place(arrays, memory, experts));
  if (memory) std::memcpy(where, &arrays, sizeof arrays);
  return bytes;
}

void emulate_prepare(const uint8_t* a, const uint8_t* a_scale, const uint8_t* b, const uint8_t* b_scale,
                     const float* a_global, const float* b_global, bool per_row, void* y, int64_t m, int64_t n,
                     int64_t k, const int32_t* offsets, int64_t experts, int64_t out_bytes, uint8_t* a_tiles,
                     char* memory, bool reversed) {
  grouped::Arrays arrays;
  grouped::place(arrays, memory, experts);
  const gemm::Call call{a, a_scale, b, b_scale, a_global, b_global, per_row, false, nullptr, y, m, n, k, 1};
  const grouped::Groups groups{call, offsets, experts, out_bytes, a_tiles, arrays};
  emulator::launch(grouped::tiles_of(m, experts), grouped::kThreads, reversed,
                   [&] { grouped::prepare_kernel(groups); });
}

}  // extern "C"
