// nvfp4_linear.packed: what its kernels share, and the kernel for few tokens, which sm_80 and later have.
//
// Weights are operand a, decoded in registers from the blob of repack_plan.h: a word is four registers after nine
// operations, scaled exactly by one multiplication each. Tokens are operand b.
#pragma once
#include "../common/hopper.cuh"
#include "linear_epilogue.cuh"
#include "linear_packed_plan.h"

namespace n3::nvfp4_linear_packed {

using nvfp4_linear::Epilogue;
using nvfp4_linear::relu2;

struct Problem {
  const void* x;        // [m, k], 16-byte aligned
  const uint8_t* blob;  // [row_tiles(n), row_bytes(k)]
  const float* global_scale;
  const void* bias;     // [n] or null
  void* y;              // [m, n]
  int64_t m, n, k;
  int32_t splits, row_groups;
  bool relu2;
};

// ---------------------------------------------------------------- decoding

// The decoded weights are e2m1 * e4m3 * 2^-8 * 2^fold: for bfloat16 a power of two of the global scale goes into them,
// so that sums of huge activations do not overflow where the results do not.
struct Global {
  uint32_t offset;  // bfloat16: what is added to the exponents of two scales, bits in place
  float rest;       // results are sum * 2^8 * rest, multiplied in this order: 2^8 alone is exact

  template <typename T>
  N3_DEVICE static Global of(float global) {
    if constexpr (std::is_same_v<T, device::F16>) return {0, global};
    int fold = int(float_bits(global) >> 23 & 0xff) - 127;
    fold = fold < -100 ? -100 : fold > 1 ? 1 : fold;
    // Codes come times 2^-126 and the weight is to be 2^-8 of its value: the factor is 2^118 s 2^fold. Bits e of a byte
    // stand for 2^(e - 21), so that the exponent of the factor is e - 21 + 118 + 127 + fold.
    return {uint32_t(224 + fold) * 0x00800080u, global * bits_float(uint32_t(127 - fold) << 23)};
  }
};

// Two factors, of row g in the lower half and row g + 8 in the upper, from two bytes of scales.
template <typename T>
N3_DEVICE uint32_t factors(uint32_t bytes, const Global& global) {
  return std::is_same_v<T, device::BF16> ? bytes * 16 + global.offset : bytes * 128;
}

// Operand a of step kStep of 16 k out of a tile.
template <typename T, int kStep>
N3_DEVICE void decode(uint4 codes, uint2 scales, const Global& global, uint32_t (&a)[4]) {
  const uint32_t word = kStep == 0 ? codes.x : kStep == 1 ? codes.y : kStep == 2 ? codes.z : codes.w;
  const uint32_t pair =
      factors<T>(device::spread_bytes<kStep % 2 * 2>(kStep < 2 ? scales.x : scales.y), global);
  uint32_t r[4];
  if constexpr (std::is_same_v<T, device::BF16>) {
    blob::codes_bf16(word, r);
  } else {
    blob::codes_f16(word, r);
  }
  a[0] = device::scale_pair<T, 0>(r[0], pair);
  a[1] = device::scale_pair<T, 1>(r[1], pair);
  a[2] = device::scale_pair<T, 0>(r[2], pair);
  a[3] = device::scale_pair<T, 1>(r[3], pair);
}

// What a lane holds of a tile.
struct Weights {
  uint4 codes;
  uint2 scales;

  // From where the lane's codes are.
  N3_DEVICE static Weights load(const uint8_t* codes, int lane) {
    return {device::load_once<uint4>(codes),
            device::load_once<uint2>(codes + (blob::kCodes + lane / 4 * 8 - 16 * lane))};
  }
};

// Whether the output is NaN whatever x is.
N3_DEVICE bool marked(const Problem& p, int64_t row) {
  return row < p.n && p.blob[(row / blob::kRows + 1) * blob::row_bytes(p.k) - blob::kMarks + row % blob::kRows];
}

// A sum as Epilogue takes it.
N3_DEVICE float finished(float sum, bool nan) { return nan ? bits_float(0x7fc00000) : sum * 256.f; }

// ---------------------------------------------------------------- few tokens

// In a stage a token has 128 bytes, 64 k, in pieces of 16 that the token permutes: eight tokens' rows of a matrix touch
// all banks.
N3_DEVICE int piece_at(int token, int piece) { return token * 128 + ((piece ^ token) & 7) * 16; }

// What a lane copies of the tokens, past registers: a piece of tokens lane / 8, 4 more, and so on.
template <typename T, typename Shape>
struct Tokens {
  const T* from;   // of the first token, in the tile that is next
  int64_t step;    // to four tokens on
  int64_t left;    // k from the piece to the end
  uint32_t valid;  // which of them are there
  int to;          // the first one's place in a stage

  N3_DEVICE Tokens(const Problem& p, int64_t token0, int64_t k0, int lane)
      : step(4 * p.k), left(p.k - k0 - lane % 8 * 8), valid(0), to(piece_at(lane / 8, lane % 8)) {
    const int64_t token = token0 + lane / 8;
    from = static_cast<const T*>(p.x) + token * p.k + k0 + lane % 8 * 8;
#pragma unroll
    for (int i = 0; i < 2 * Shape::kGroups; ++i) valid |= uint32_t(token + 4 * i < p.m) << i;
  }

  N3_DEVICE void load(char* stage, int64_t advance) {
    const T* source = from;
#pragma unroll
    for (int i = 0; i < 2 * Shape::kGroups; ++i, source += step) {  // nothing is read where it is not valid
      device::copy_async<16>(stage + (to ^ i % 2 * 64) + 512 * i, source, (valid >> i & 1) && left > 0);
    }
    from += advance;
    left -= advance;
  }
};

template <typename T, typename Shape>
N3_DEVICE void multiply(float (&sum)[Shape::kTiles][Shape::kGroups][4], const Weights (&w)[Shape::kTiles],
                        const char* stage, const Global& global, int lane) {
  uint32_t b[Shape::kGroups][2][4];
  const int at = piece_at(lane % 8, lane / 8);
#pragma unroll
  for (int i = 0; i < Shape::kGroups; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) device::load_matrices(stage + (at ^ 64 * h) + 1024 * i, b[i][h]);  // k 32 h ..
  }
#pragma unroll
  for (int r = 0; r < Shape::kTiles; ++r) {
    const auto step = [&](auto constant) {
      constexpr int kStep = decltype(constant)::value;
      uint32_t a[4];
      decode<T, kStep>(w[r].codes, w[r].scales, global, a);
#pragma unroll
      for (int i = 0; i < Shape::kGroups; ++i) {
        const uint32_t(&from)[4] = b[i][kStep / 2];
        device::mma_m16n8k16<T>(sum[r][i], a, {from[kStep % 2 * 2], from[kStep % 2 * 2 + 1]});
      }
    };
    step(std::integral_constant<int, 0>{});
    step(std::integral_constant<int, 1>{});
    step(std::integral_constant<int, 2>{});
    step(std::integral_constant<int, 3>{});
  }
}

template <typename T, typename Shape>
N3_DEVICE void store(const Problem& p, const Global& global, int64_t row_tile0, int64_t token0, int at, float4 sum) {
  const int lane = at % 32, group = at / 32 % Shape::kGroups, tile = at / 32 / Shape::kGroups;
  const int64_t row = (row_tile0 + tile) * 16 + lane / 4, token = token0 + 8 * group + lane % 4 * 2;
  const Epilogue<T> put{static_cast<const T*>(p.bias), static_cast<T*>(p.y), p.m, p.n, global.rest, p.relu2};
  const bool nan[2] = {marked(p, row), marked(p, row + 8)};
  const float v[4] = {sum.x, sum.y, sum.z, sum.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) put(token + i % 2, row + i / 2 * 8, finished(v[i], nan[i / 2]));
}

N3_DEVICE float4 add(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

//   grid  plan().blocks in clusters of splits: tokens outermost, then rows     block  kStreamThreads
//   smem  Shape::kShared, dynamic
// Each tile of the weights is read by one warp, from global memory to registers. The warps of a cluster share the k of
// its rows; their sums are added in one order, that of the warps in a block, then that of the blocks, read from each
// other's shared memory; without clusters (before sm_90) there is one block, splits is 1. A sum's order depends on the
// number of splits alone, never on who else is in the batch.
template <typename T, typename Shape>
__global__ __launch_bounds__(kStreamThreads, Shape::kBlocks) void tensor_stream_kernel(
    const __grid_constant__ Problem p) {
  constexpr int kTiles = Shape::kTiles, kGroups = Shape::kGroups, kAhead = Shape::kAhead;
  char* memory = hopper::shared_memory();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, rank = int(blockIdx.x % p.splits);
  const int64_t group = blockIdx.x / p.splits, row_tile0 = group % p.row_groups * kTiles;
  const int64_t token0 = group / p.row_groups * (8 * kGroups);
  const int32_t tiles = int32_t(blob::depth_tiles(p.k));
  const Range part = part_of(tiles, p.splits, rank), mine = warp_tiles(tiles, p.splits, rank, warp);
  const int64_t last = blob::row_tiles(p.n) - 1, row_bytes = blob::row_bytes(p.k);
  const auto weights_at = [&](int r) {  // a row of tiles past the end is the last, not stored
    return p.blob + (row_tile0 + r < last ? row_tile0 + r : last) * row_bytes;
  };
  if (threadIdx.x < kTiles) {
    hopper::prefetch_bytes(weights_at(threadIdx.x) + int64_t(part.begin) * blob::kTile,
                           uint32_t(part.end - part.begin) * blob::kTile);
  }
  hopper::let_next_start();
  hopper::wait_for_previous();

  const Global global = Global::of<T>(*p.global_scale);
  const uint8_t* weights[kTiles];
#pragma unroll
  for (int r = 0; r < kTiles; ++r) weights[r] = weights_at(r) + int64_t(mine.begin) * blob::kTile + 16 * lane;
  Tokens<T, Shape> tokens(p, token0, int64_t(mine.begin) * blob::kDepth, lane);
  char* stages = memory + warp * kAhead * Shape::kStage;
  Weights ring[kAhead][kTiles];
  const auto load = [&](int tile, int slot) {  // tile after tile
    if (tile < mine.end) {
#pragma unroll
      for (int r = 0; r < kTiles; ++r) {
        ring[slot][r] = Weights::load(weights[r], lane);
        weights[r] += kStreamWarps * blob::kTile;
      }
      tokens.load(stages + slot * Shape::kStage, kStreamWarps * blob::kDepth);
    }
    device::commit_copies();  // also when empty: wait_copies counts groups
  };

  float sum[kTiles][kGroups][4] = {};
#pragma unroll
  for (int s = 0; s < kAhead; ++s) load(mine.begin + s * kStreamWarps, s);
  for (int tile = mine.begin; tile < mine.end; tile += kAhead * kStreamWarps) {
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      const int at = tile + s * kStreamWarps;
      if (at < mine.end) {
        device::wait_copies<kAhead - 1>();
        __syncwarp();
        multiply<T, Shape>(sum, ring[s], stages + s * Shape::kStage, global, lane);
        __syncwarp();  // nobody reads the stage any more
        load(at + kAhead * kStreamWarps, s);
      }
    }
  }

  device::wait_copies<0>();
  __syncthreads();  // the stages become sums
  auto* sums = reinterpret_cast<float4*>(memory);
#pragma unroll
  for (int r = 0; r < kTiles; ++r) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const float(&v)[4] = sum[r][i];
      sums[warp * Shape::kSums + (r * kGroups + i) * 32 + lane] = make_float4(v[0], v[1], v[2], v[3]);
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < Shape::kSums; at += kStreamThreads) {
    float4 total = sums[at];
#pragma unroll
    for (int w = 1; w < kStreamWarps; ++w) total = add(total, sums[w * Shape::kSums + at]);
    if (p.splits == 1) {
      store<T, Shape>(p, global, row_tile0, token0, at, total);
    } else {
      sums[at] = total;
    }
  }
  if (p.splits == 1) return;
  hopper::sync_cluster();
  for (int at = rank + p.splits * threadIdx.x; at < Shape::kSums; at += p.splits * kStreamThreads) {
    float4 total = hopper::read_cluster(sums + at, 0);
    for (int r = 1; r < p.splits; ++r) total = add(total, hopper::read_cluster(sums + at, r));
    store<T, Shape>(p, global, row_tile0, token0, at, total);
  }
  hopper::sync_cluster();  // a block's shared memory is there until all have read it
}

}  // namespace n3::nvfp4_linear_packed
