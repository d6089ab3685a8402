// The launches of a quantiser, in order. `launch(kernel, blocks, arguments ...)` starts one of kThreads threads on
// `launch.limit` blocks at most, a GPU's or the emulator's.
#pragma once
#include "quantize_kernel.cuh"
#include "quantize_square_kernel.cuh"
#include "quantize_transposed_kernel.cuh"

namespace n3::nvfp4_quantize {

// Words of scratch: maxima that one launch leaves to the next, if there are two.
inline int64_t words_of(const Args& args) {
  if (args.given) return 0;
  if (!args.per_row) return kMaxPartials;
  return args.k_stride == 1 ? 0 : kMaxSplits * args.rows;
}

// The maxima of the whole tensor, for the launch that follows.
template <typename T, typename Source, typename Launch>
void run_amax(Args& args, uint32_t* memory, const Launch& launch) {
  const Tiles tiles = row_tiles(args.rows, args.ks);
  args.partial = memory, args.partials = int32_t(tiles.blocks(std::min<uint32_t>(kMaxPartials, launch.limit)));
  launch(amax_kernel<T, Source>, args.partials, args, tiles, memory);
}

template <typename T, typename Source, typename Launch>
void run_rows(const Args& args, const Launch& launch) {
  const int64_t rows = rows_to_write(args.rows, args.swizzled), cols = cols_to_write(args.ks, args.swizzled);
  const Tiles tiles = args.per_row ? whole_row_tiles(rows, cols) : row_tiles(rows, cols);
  launch(rows_kernel<T, Source>, tiles.blocks(launch.limit), args, tiles);
}

template <typename T, typename Launch>
void run_transposed(Args args, uint32_t* memory, const Launch& launch) {
  if (!args.given) {
    const TransposedTiles tiles = transposed_tiles(args.rows, args.ks, args.x.rows_each, false);
    const int32_t splits = args.per_row ? row_splits(tiles) : 1;
    const uint32_t blocks = args.per_row ? tiles.tiles.count / tiles.tiles.across * splits
                                         : tiles.tiles.blocks(std::min<uint32_t>(kMaxPartials, launch.limit));
    launch(transposed_amax_kernel<T>, blocks, args, tiles, memory, splits);
    args.partial = memory, args.partials = args.per_row ? splits : int32_t(blocks);
  }
  const TransposedTiles tiles = transposed_tiles(args.rows, args.ks, args.x.rows_each, args.swizzled);
  launch(transposed_kernel<T>, tiles.tiles.blocks(launch.limit), args, tiles);
}

// Of x whose rows lie side by side. Where the global scale of the tensor is computed, the second launch reads x from L2
// if it fits.
template <typename T, typename Source, typename Launch>
void run_rows_or_squares(Args args, uint32_t* memory, const Launch& launch) {
  if (!args.given && !args.per_row) {
    Args whole = as_one_row(args);
    run_amax<T, Source>(whole, memory, launch);
    args.partial = whole.partial, args.partials = whole.partials;
  }
  if (!args.square) return run_rows<T, Source>(as_one_row(args), launch);
  const Tiles tiles = square_tiles(rows_to_write(args.rows, args.swizzled), cols_to_write(args.ks, args.swizzled));
  launch(square_kernel<T>, tiles.blocks(launch.limit), args, tiles);
}

template <typename T, typename Launch>
void run(const Args& args, uint32_t* memory, const Launch& launch) {
  if (args.k_stride != 1) return run_transposed<T>(args, memory, launch);
  if (args.signs || args.seed) return run_rows_or_squares<T, Training>(args, memory, launch);
  run_rows_or_squares<T, Plain>(args, memory, launch);
}

}  // namespace n3::nvfp4_quantize
