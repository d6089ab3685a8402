// Quantising x.mT where it lies: neighbours in memory are neighbouring rows. How training makes its column-wise copies.
#pragma once
#include "quantize_block.cuh"

namespace n3::nvfp4_quantize {

// Where a thread works: the rows `row` and row + 1 of block c.
struct Place {
  int64_t row, c;
  int64_t in_matrix;  // of the first row
  const void* from;   // the element (row, 16 c)
  bool real[2];
};

N3_DEVICE Place place_of(const Args& args, const TransposedTiles& t, uint32_t tile, size_t element) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t down = t.tiles.by_across.quotient(tile), across = tile - down * t.tiles.across;
  const uint32_t matrix = t.by_down.quotient(down);
  Place p;
  p.in_matrix = int64_t(down - matrix * t.down) * kTransposedRows + 2 * lane;
  p.row = matrix * args.x.rows_each + p.in_matrix;
  p.c = int64_t(across) * kTransposedBlocks + warp;
  const int64_t at = matrix * args.x.batch_stride + p.in_matrix + p.c * 16 * args.k_stride;
  p.from = static_cast<const char*>(args.x.data) + at * int64_t(element);
#pragma unroll
  for (int j = 0; j < 2; ++j) p.real[j] = p.c < args.ks && p.in_matrix + j < args.x.rows_each;
  return p;
}

N3_DEVICE void load_pair(const float* p, float& a, float& b) {
  const uint2 both = *reinterpret_cast<const uint2*>(p);
  a = bits_float(both.x), b = bits_float(both.y);
}
template <typename T>
N3_DEVICE void load_pair(const T* p, float& a, float& b) {
  const uint32_t both = *reinterpret_cast<const uint32_t*>(p);
  a = device::widen(T{uint16_t(both)}), b = device::widen(T{uint16_t(both >> 16)});
}

// The blocks of both rows: 16 loads of a pair, each 128 neighbouring bytes of a warp in 16-bit types. Zeros where there
// is no row.
template <typename T>
N3_DEVICE void load_rows(const Args& args, const Place& place, float (&v)[2][16]) {
  const T* p = static_cast<const T*>(place.from);
  if (args.x.vectors && place.real[1]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) load_pair(p + i * args.k_stride, v[0][i], v[1][i]);
  } else {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int i = 0; i < 16; ++i) v[j][i] = place.real[j] ? device::widen(p[i * args.k_stride + j]) : 0.f;
    }
  }
  if (args.signs) {
    rotate<T>(v[0], args.signs);
    rotate<T>(v[1], args.signs);
  }
}

// 8 neighbouring lanes have the 16 rows of a square tile; the tree of the error sum ends inside a thread. Two blocks of
// 16 that are no part of a tile have nobody to ask.
struct PairTeam {
  bool square;
  N3_DEVICE void max(uint32_t (&v)[2]) const {
    if (!square) return;
    uint32_t top = ::max(v[0], v[1]);
#pragma unroll
    for (int offset = 4; offset; offset /= 2) top = ::max(top, __shfl_xor_sync(0xffffffffu, top, offset));
    v[0] = v[1] = top;
  }
  N3_DEVICE void sum(float (&v)[2]) const {
    if (!square) return;
#pragma unroll
    for (int offset = 4; offset; offset /= 2) {
#pragma unroll
      for (int j = 0; j < 2; ++j) v[j] += __shfl_xor_sync(0xffffffffu, v[j], offset);
    }
    v[0] = v[1] = v[0] + v[1];
  }
};

// The global scales of two rows, from given ones or from the maxima of the parts of each row.
N3_DEVICE void row_scales(const Args& args, const Place& p, Global (&g)[2]) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float from = 0.f;
    if (p.real[j] && args.given) from = args.given[p.row + j];
    if (p.real[j] && !args.given) {
      uint32_t top = 0;
      for (int s = 0; s < args.partials; ++s) top = max(top, args.partial[s * args.rows + p.row + j]);
      from = bits_float(top);
    }
    g[j] = global_scale(from, args.given != nullptr, args.four_over_six);
    if (p.real[j] && p.c == 0) args.global_out[p.row + j] = g[j].out;
  }
}

//   grid  tiles.blocks(), each going on by gridDim.x tiles of 64 rows and 8 blocks     block kThreads
//   smem  codes and scales of a tile
// Loads run along the rows, stores along k: the codes cross in shared memory, where a row is 72 bytes, so that lanes
// two rows apart meet in the same bank in pairs only.
template <typename T>
__global__ __launch_bounds__(kThreads, 2) void transposed_kernel(const Args args, const TransposedTiles tiles) {
  __shared__ uint2 codes[kTransposedRows][kTransposedBlocks + 1];
  __shared__ uint8_t scales[kTransposedRows][kTransposedBlocks];
  Global g[2] = {};
  if (!args.per_row) g[0] = g[1] = tensor_scale(args);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (uint32_t tile = blockIdx.x; tile < tiles.tiles.count; tile += gridDim.x) {
    const Place p = place_of(args, tiles, tile, sizeof(T));
    float v[2][16];
    load_rows<T>(args, p, v);
    if (args.per_row) row_scales(args, p, g);
    const int64_t first[2] = {(p.row * args.ks + p.c) * 16, ((p.row + 1) * args.ks + p.c) * 16};
    Quantised out[2];
    quantize_blocks(v, g, first, args, args.seed, PairTeam{args.square}, out);
    __syncthreads();  // the last tile has been stored
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      codes[2 * lane + j][warp] = make_uint2(out[j].codes.word[0], out[j].codes.word[1]);
      scales[2 * lane + j][warp] = out[j].scale;
    }
    __syncthreads();
    const int64_t row0 = p.row - 2 * lane, in_matrix0 = p.in_matrix - 2 * lane, c = p.c - warp + threadIdx.x % 8;
    for (int r = threadIdx.x / kTransposedBlocks; r < kTransposedRows; r += kThreads / kTransposedBlocks) {
      const int64_t row = row0 + r;
      if (in_matrix0 + r < args.x.rows_each && c < args.ks) {
        const uint2 word = codes[r][threadIdx.x % 8];
        store(args, row, c, {{{word.x, word.y}}, scales[r][threadIdx.x % 8]});
      } else if (row >= args.rows || c >= args.ks) {
        pad(args, row, c);
      }
    }
  }
}

// Maxima as of amax_kernel, or of rows: partial[s, row] over part s of `splits` of each row.
//   grid  tiles.blocks(kMaxPartials), or splits for each 64 rows     block kThreads     smem  maxima of a tile's rows
template <typename T>
__global__ __launch_bounds__(kThreads) void transposed_amax_kernel(const Args args, const TransposedTiles tiles,
                                                                   uint32_t* partial, int splits) {
  __shared__ uint32_t of_row[kTransposedBlocks][kTransposedRows];
  const uint32_t across = tiles.tiles.across, band = blockIdx.x / splits, part = blockIdx.x % splits;
  const uint32_t begin = args.per_row ? band * across + part : blockIdx.x;
  const uint32_t end = args.per_row ? (band + 1) * across : tiles.tiles.count;
  const uint32_t step = args.per_row ? splits : gridDim.x;
  uint32_t top[2] = {};
  for (uint32_t tile = begin; tile < end; tile += step) {
    float v[2][16];
    load_rows<T>(args, place_of(args, tiles, tile, sizeof(T)), v);
    top[0] = max(top[0], finite_max(v[0]));
    top[1] = max(top[1], finite_max(v[1]));
  }
  if (!args.per_row) {
    const uint32_t both = device::block_max<kThreads>(max(top[0], top[1]));
    if (threadIdx.x == 0) partial[blockIdx.x] = both;
    return;
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  of_row[warp][2 * lane] = top[0], of_row[warp][2 * lane + 1] = top[1];
  __syncthreads();
  if (threadIdx.x >= kTransposedRows) return;
  const Place p = place_of(args, tiles, begin, sizeof(T));  // of this block's rows, whatever the column
  const int64_t in_matrix = p.in_matrix - 2 * lane + threadIdx.x;
  if (in_matrix >= args.x.rows_each) return;
  uint32_t all = 0;
#pragma unroll
  for (int w = 0; w < kTransposedBlocks; ++w) all = max(all, of_row[w][threadIdx.x]);
  partial[part * args.rows + p.row - 2 * lane + threadIdx.x] = all;
}

}  // namespace n3::nvfp4_quantize
