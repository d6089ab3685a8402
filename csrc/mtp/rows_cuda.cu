#include "rows_cuda.h"

#include "cut_kernel.cuh"
#include "tile_kernel.cuh"

namespace n3::mtp {

void launch_records(const char* op, const RowArgs& a, int64_t units, cudaStream_t stream) {
  if (units == 0) return;
  with_type(a.type, [&]<typename T>() {
    // Logits come from a kernel that may not let others start early: an ordinary launch.
    tile_kernel<T><<<uint32_t(units * a.tiles), kTileThreads, stage_bytes(a, kTileSubs), stream>>>(a);
    N3_CUDA_CHECK(op, cudaGetLastError());
    if (a.cuts) launch_after(op, cut_kernel<T>, units, kCutThreads, stage_bytes(a, kCutWarps), stream, a);
  });
}

}  // namespace n3::mtp
