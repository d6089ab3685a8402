// Quantising rows whose elements lie side by side: nvfp4_quantize with blocks 1x16, and the producers of an activation.
#pragma once
#include "quantize_block.cuh"

namespace n3::nvfp4_quantize {

// ---- what is quantised: a source loads the block c of a row, and says whether there may be signs and a seed, and how
// many thread blocks its kernel is to leave registers for

struct Plain {
  static constexpr bool kTraining = false;
  static constexpr int kBlocks = 4;
  template <typename T>
  N3_DEVICE static void load(const Args& args, const T* row, int64_t c, float (&v)[16]) {
    load_block(row + c * 16, args.x.vectors, v);
  }
};

struct Training {
  static constexpr bool kTraining = true;
  static constexpr int kBlocks = 2;
  template <typename T>
  N3_DEVICE static void load(const Args& args, const T* row, int64_t c, float (&v)[16]) {
    load_block(row + c * 16, args.x.vectors, v);
    if (args.signs) rotate<T>(v, args.signs);
  }
};

// ---- maxima of a row over the threads that share it

// The maximum over aligned groups of 2^log threads, in every thread of the block. Called by all of them.
N3_DEVICE uint32_t group_max(uint32_t v, int log) {
  __shared__ uint32_t of_warp[kThreads / 32];
  for (int offset = log < 5 ? (1 << log) / 2 : 16; offset; offset /= 2) {
    v = max(v, __shfl_xor_sync(0xffffffffu, v, offset));
  }
  if (log <= 5) return v;
  const int warp = threadIdx.x / 32, warps = 1 << (log - 5);
  __syncthreads();  // the last call's words have been read
  if (threadIdx.x % 32 == 0) of_warp[warp] = v;
  __syncthreads();
  for (int w = warp / warps * warps, end = w + warps; w < end; ++w) v = max(v, of_warp[w]);
  return v;
}

// The blocks c, c + step, ... of a row, by one of the 2^log threads that share the row. `load(c, v)` gives a block; the
// first is kept in registers, others are loaded a second time where the row's maximum is needed first: they are in L1.
// Called by all threads, for rows beyond the last one too.
template <typename Load>
N3_DEVICE void quantize_row(const Args& args, const int64_t* seed, const Global& tensor, int64_t row, int64_t c,
                            int64_t step, int log, Load load) {
  const bool real = row < args.rows;
  float v[1][16] = {};
  if (real && c < args.ks) load(c, v[0]);
  Global g[1] = {tensor};
  if (args.per_row) {
    float from = args.given && real ? args.given[row] : 0.f;
    if (!args.given) {
      uint32_t top = finite_max(v[0]);
      for (int64_t other = c + step; real && other < args.ks; other += step) {
        float w[16];
        load(other, w);
        top = max(top, finite_max(w));
      }
      from = bits_float(group_max(top, log));
    }
    g[0] = global_scale(from, args.given != nullptr, args.four_over_six);
    if (real && c == 0) args.global_out[row] = g[0].out;
  }
  const int64_t end = cols_to_write(args.ks, args.swizzled);
  for (;;) {
    if (real && c < args.ks) {
      Quantised out[1];
      const int64_t first[1] = {(row * args.ks + c) * 16};
      quantize_blocks(v, g, first, args, seed, Alone{}, out);
      store(args, row, c, out[0]);
    } else {
      pad(args, row, c);
    }
    c += step;
    if (c >= end) return;
    if (real && c < args.ks) load(c, v[0]);
  }
}

// Codes, scales and the global scale, which is given, follows from the maxima of the launch before, or is one per row:
// then tiles hold whole rows, which are read from memory once.
//   grid  tiles.blocks(), each going on by gridDim.x tiles     block kThreads     smem  two words per warp
// A thread owns blocks of 16, so maxima and the ordered sums of four_over_six need no other thread. Its two 16-byte
// loads of 16-bit elements touch the two halves of one sector.
template <typename T, typename Source>
__global__ __launch_bounds__(kThreads, Source::kBlocks) void rows_kernel(const Args args, const Tiles tiles) {
  Global tensor{};
  if (!args.per_row) tensor = tensor_scale(args);
  const int width = 1 << tiles.log_width, x = threadIdx.x & (width - 1), y = threadIdx.x >> tiles.log_width;
  const int64_t step = args.per_row ? width : int64_t(1) << 62;
  for (uint32_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const uint32_t down = tiles.by_across.quotient(tile), across = tile - down * tiles.across;
    // int64: the elements of x pass 2^31.
    const int64_t row = int64_t(down) * tiles.height + y, c = int64_t(across) * width + x;
    const T* from = static_cast<const T*>(args.x.data) + (row < args.rows ? args.x.at(row) : 0);
    quantize_row(args, Source::kTraining ? args.seed : nullptr, tensor, row, c, step, tiles.log_width,
                 [&](int64_t at, float(&v)[16]) { Source::template load<T>(args, from, at, v); });
  }
}

// partial[b] = largest finite magnitude, as bits, of what is quantised, over the tiles b, b + gridDim.x, ...
//   grid  tiles.blocks(kMaxPartials)     block kThreads     smem  one word per warp
// Magnitudes are compared as integers: they are ordered like the floats.
template <typename T, typename Source>
__global__ __launch_bounds__(kThreads) void amax_kernel(const Args args, const Tiles tiles, uint32_t* partial) {
  const int width = 1 << tiles.log_width, x = threadIdx.x & (width - 1), y = threadIdx.x >> tiles.log_width;
  uint32_t top = 0;
  for (uint32_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const uint32_t down = tiles.by_across.quotient(tile), across = tile - down * tiles.across;
    const int64_t row = int64_t(down) * tiles.height + y, c = int64_t(across) * width + x;
    if (row >= args.rows || c >= args.ks) continue;
    float v[16];
    Source::template load<T>(args, static_cast<const T*>(args.x.data) + args.x.at(row), c, v);
    top = max(top, finite_max(v));
  }
  top = device::block_max<kThreads>(top);
  if (threadIdx.x == 0) partial[blockIdx.x] = top;
}

}  // namespace n3::nvfp4_quantize
