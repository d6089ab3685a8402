// The launches of the fused producers, in order; `launch` as in quantize_run.cuh.
#pragma once
#include "producers_kernel.cuh"
#include "quantize_run.cuh"

namespace n3::nvfp4_producers {

// Words of scratch: maxima that one launch leaves to the next, if there are two, and 1 / rms of rows.
inline int64_t words_of(const Args& args, bool norm) {
  if (args.given || args.per_row) return 0;
  return nvfp4_quantize::kMaxPartials + (norm ? args.rows : 0);
}

template <typename T, typename Source, typename Launch>
void run_activation(Args args, uint32_t* memory, const Launch& launch) {
  if (!args.given && !args.per_row) nvfp4_quantize::run_amax<T, Source>(args, memory, launch);
  nvfp4_quantize::run_rows<T, Source>(args, launch);
}

template <typename T, typename Launch>
void run_norm(Args args, NormArgs n, uint32_t* memory, const Launch& launch) {
  n.pass = Pass::kAll;
  if (!args.given && !args.per_row) {
    const Tiles tiles = nvfp4_quantize::whole_row_tiles(args.rows, args.ks);
    const uint32_t blocks = tiles.blocks(std::min<uint32_t>(nvfp4_quantize::kMaxPartials, launch.limit));
    n.partial = memory, n.rstd = reinterpret_cast<float*>(memory + nvfp4_quantize::kMaxPartials);
    n.pass = Pass::kMaxima;
    launch(norm_kernel<T>, blocks, args, n, tiles);
    args.partial = memory, args.partials = int32_t(blocks), n.pass = Pass::kCodes;
  }
  const Tiles tiles = nvfp4_quantize::whole_row_tiles(nvfp4_quantize::rows_to_write(args.rows, args.swizzled),
                                                      nvfp4_quantize::cols_to_write(args.ks, args.swizzled));
  launch(norm_kernel<T>, tiles.blocks(launch.limit), args, n, tiles);
}

}  // namespace n3::nvfp4_producers
