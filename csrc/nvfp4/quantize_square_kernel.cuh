// Quantising with one scale per 16x16 tile, of rows whose elements lie side by side.
#pragma once
#include "quantize_block.cuh"

namespace n3::nvfp4_quantize {

// The 8 lanes 4 apart have the rows g and g + 8 of a tile each: the tree of the error sum, i + 8 first, then i + 4,
// i + 2 and i + 1, begins inside a thread.
struct SquareTeam {
  N3_DEVICE void max(uint32_t (&v)[2]) const {
    uint32_t top = ::max(v[0], v[1]);
#pragma unroll
    for (int offset = 16; offset >= 4; offset /= 2) top = ::max(top, __shfl_xor_sync(0xffffffffu, top, offset));
    v[0] = v[1] = top;
  }
  N3_DEVICE void sum(float (&v)[2]) const {
    float total = v[0] + v[1];
#pragma unroll
    for (int offset = 16; offset >= 4; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
    v[0] = v[1] = total;
  }
};

//   grid  tiles.blocks(), each going on by gridDim.x tiles     block kThreads     smem  one word per warp
// A warp has 16 rows and 4 blocks of each: 128 neighbouring bytes of a row in 16-bit types, 32 of its codes.
template <typename T>
__global__ __launch_bounds__(kThreads, 2) void square_kernel(const Args args, const Tiles tiles) {
  const Global tensor = tensor_scale(args);
  const Global g[2] = {tensor, tensor};
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int log_warps = tiles.log_width - 2;  // side by side
  const int x = (warp & ((1 << log_warps) - 1)) * 4 + lane % 4, y = (warp >> log_warps) * 16 + lane / 4;
  for (uint32_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const uint32_t down = tiles.by_across.quotient(tile), across = tile - down * tiles.across;
    const int64_t row = int64_t(down) * tiles.height + y, c = (int64_t(across) << tiles.log_width) + x;
    const bool real = row < args.rows && c < args.ks;  // then row + 8 is too, and in the same matrix
    float v[2][16] = {};
    if (real) {
      const T* from = static_cast<const T*>(args.x.data) + args.x.at(row) + c * 16;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        load_block(from + j * 8 * args.x.row_stride, args.x.vectors, v[j]);
        if (args.signs) rotate<T>(v[j], args.signs);
      }
    }
    const int64_t first[2] = {(row * args.ks + c) * 16, ((row + 8) * args.ks + c) * 16};
    Quantised out[2];
    quantize_blocks(v, g, first, args, args.seed, SquareTeam{}, out);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (real) {
        store(args, row + 8 * j, c, out[j]);
      } else {
        pad(args, row + 8 * j, c);
      }
    }
  }
}

}  // namespace n3::nvfp4_quantize
