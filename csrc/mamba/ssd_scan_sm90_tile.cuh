// ssd_scan on sm_90: what a computing warpgroup does with its tile: states between registers and memory, operands of the
// products, y.
#pragma once
#include "ssd_scan_sm90_problem.cuh"

namespace n3::hopper {
template <int kN>
struct Product<mamba::Saturated, kN> : Product<device::F16, kN> {};
}  // namespace n3::hopper

namespace n3::ssd_scan::sm90 {

// A warpgroup's state, transposed: with g = lane / 4, t = lane % 4 and warp w, s[m][4 j + 2 h + e] is state dimension
// 64 m + 16 w + 8 h + g of channel 8 j + 2 t + e.
template <typename Tile>
using State = float[Tile::kSubtiles][Tile::kP / 2];

// What a thread needs to find its elements: of 8 rows and 8 columns of a result it holds (row, col) and (row, col + 1).
struct Lane {
  int row, col, warp;

  N3_DEVICE static Lane mine() {
    return {int(threadIdx.x) % 32 / 4, int(threadIdx.x) % 4 * 2, int(threadIdx.x) / 32 % 4};
  }
  // Its first element in a tile of channels, for element_from().
  template <typename Tile>
  N3_DEVICE int corner() const {
    return element_at<Tile::kColumns>(row, col, 8);
  }
};

// State dimensions 16 n .. of a tile of a slot, for one warp.
struct StateRows {
  int64_t base;  // of the slot, head and first channel
  int first, channels;
};

N3_DEVICE StateRows state_rows(const View& v, const Job& job, int32_t slot, int block) {
  return {mamba::offset(v, slot, job.tile.head, job.tile.channel), 64 * block + 16 * (int(threadIdx.x) / 32 % 4),
          job.channels};
}

// 64 dimensions of the state, 16 of each warp, to memory. In `scratch`, the warp's own, a channel's are neighbours.
template <int kP>
N3_DEVICE void store_block(const Problem& p, const float (&s)[kP / 2], const StateRows& rows, float* scratch) {
  const Lane lane = Lane::mine();
  const View& v = p.final;
#pragma unroll
  for (int i = 0; i < kP / 2; ++i) scratch[(i / 4 * 8 + lane.col + i % 2) * 16 + i / 2 % 2 * 8 + lane.row] = s[i];
  __syncwarp();
#pragma unroll 1
  for (int i = threadIdx.x % 32; i < 16 * rows.channels; i += 32) {
    const int n = rows.first + i % 16;
    if (n >= p.d_state) continue;
    const int64_t at = rows.base + i / 16 * v.strides[2] + n * v.strides[3];
    mamba::store(v, at, scratch[i]);
  }
  __syncwarp();
}

template <int kP>
N3_DEVICE void load_block(const Problem& p, float (&s)[kP / 2], const StateRows& rows, float* scratch) {
  const Lane lane = Lane::mine();
  const View& v = p.initial;
#pragma unroll 4
  for (int i = threadIdx.x % 32; i < 16 * kP; i += 32) {
    const int n = rows.first + i % 16;
    const bool inside = n < p.d_state && i < 16 * rows.channels;
    scratch[i] = inside ? mamba::load(v, rows.base + i / 16 * v.strides[2] + n * v.strides[3]) : 0.f;
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kP / 2; ++i) s[i] = scratch[(i / 4 * 8 + lane.col + i % 2) * 16 + i / 2 % 2 * 8 + lane.row];
  __syncwarp();
}

// The 16-bit state, [kN, kP] in rows of channels: operand b of product 2.
template <typename T, typename Tile>
N3_DEVICE void publish_state(const State<Tile>& s, char* to) {
  const Lane lane = Lane::mine();
  const int corner = lane.corner<Tile>();
  char* mine = to + 16 * lane.warp * Tile::kRowBytes;
#pragma unroll
  for (int m = 0; m < Tile::kSubtiles; ++m) {
    if (64 * m + 16 * lane.warp >= Tile::kN) continue;  // N = 96: half of the second block is not there
#pragma unroll
    for (int i = 0; i < Tile::kP / 2; i += 2) {
      const int at = element_from<Tile::kColumns>(corner, 64 * m + i / 2 % 2 * 8, i / 4, Tile::kN);
      *reinterpret_cast<uint32_t*>(mine + at) = device::pack<T>(s[m][i], s[m][i + 1]);
    }
  }
}

// x times a factor for each token. A swizzle stays inside a row, so the elements keep their places.
template <typename T, typename Tile, typename F>
N3_DEVICE void weight_tokens(const char* x, char* to, F factor) {
  constexpr int kWords = Shared<Tile>::kX / 16 / 128;  // of 16 bytes, per thread
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int at = (i * 128 + threadIdx.x % 128) * 16;
    const float f = factor(at / Tile::kRowBytes % kTokens);
    const uint4 u = *reinterpret_cast<const uint4*>(x + at);
    const auto scale = [f](uint32_t pair) { return device::pack<T>(low<T>(pair) * f, high<T>(pair) * f); };
    *reinterpret_cast<uint4*>(to + at) = make_uint4(scale(u.x), scale(u.y), scale(u.z), scale(u.w));
  }
}

// Descriptor of rows 16 k .. 16 k + 15 of a tile of `rows` rows of channels: x, the weighted x, the 16-bit state.
template <typename Tile>
N3_DEVICE uint64_t channels_at(const char* tile, int k, int rows) {
  constexpr int kBytes = Tile::kRowBytes;
  return hopper::descriptor<kBytes>(tile + k * 16 * kBytes, 8 * kBytes, rows * kBytes);
}

// Dimensions 16 k .. of B or C, tokens being rows; and tokens 16 k .. of 64 dimensions of B, these being rows.
N3_DEVICE uint64_t dimensions_at(const char* tile, int k) {
  return hopper::descriptor<128>(tile + k / 4 * kTokens * 128 + k % 4 * 32, 8 * 128, 16);
}
N3_DEVICE uint64_t tokens_at(const char* subtile, int k) {
  return hopper::descriptor<128>(subtile + k * 16 * 128, 8 * 128, kTokens * 128);
}

// Product 4: S^T += B^T (weighted x), for 64 dimensions.
template <typename T, typename Tile>
N3_DEVICE void add_tokens(float (&s)[Tile::kP / 2], const char* b, const char* weighted, int block) {
#pragma unroll
  for (int k = 0; k < kTokens / 16; ++k) {
    hopper::Product<T, Tile::kP>::template shared<hopper::Major::kMN, hopper::Major::kMN>(
        s, tokens_at(b + block * kTokens * 128, k), channels_at<Tile>(weighted, k, kTokens), true);
  }
}

// M of one warp's rows as operand a of product 3, from C B^T. Of a register of the operand, bit 0 tells of rows + 8 and
// bit 1 of columns + 8.
template <typename T>
N3_DEVICE void decay_scores(const Decays& d, const float (&scores)[32], uint32_t (&m)[4][4]) {
  const Lane lane = Lane::mine();
  const int block = lane.warp, row = kBlock * block + lane.row;
  const float* columns = d.column + first_column(block) + lane.col;
  const float rows[2] = {d.row[row], d.row[row + 8]};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (k < block) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float2 f = *reinterpret_cast<const float2*>(columns + kBlock * k + r / 2 * 8);
        const float* of = scores + 8 * k + r / 2 * 4 + r % 2 * 2;
        m[k][r] = device::pack<T>(of[0] * rows[r % 2] * f.x, of[1] * rows[r % 2] * f.y);
      }
    } else if (k == block) {
      const float a[2] = {d.a[row], d.a[row + 8]};
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        float v[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int j = r / 2 * 8 + lane.col + e;  // of the block
          const bool past = j <= lane.row + r % 2 * 8;
          const float decay = decay_between(past ? a[r % 2] : 0.f, past ? d.a[kBlock * block + j] : 0.f);
          v[e] = past ? scores[8 * k + r / 2 * 4 + r % 2 * 2 + e] * decay * d.dt[kBlock * block + j] : 0.f;
        }
        m[k][r] = device::pack<T>(v[0], v[1]);
      }
    } else {
#pragma unroll
      for (int r = 0; r < 4; ++r) m[k][r] = 0;
    }
  }
}

// For 16 bits: the quotient is good to 2 units in the last place, and 0 where 1 + e^-v passes 2^126.
N3_DEVICE float silu16(float v) { return __fdividef(v, 1.f + __expf(-v)); }

// y = (Y + D x) silu(z) of one warp's 16 tokens, in the place of x, whose elements each thread reads where it writes.
// `gate`: z of the warp's first token; `next` elements from a token to the next.
template <bool kGate, typename T, typename Tile>
N3_DEVICE void finish_tokens(const float (&y)[Tile::kP / 2], char* x, const float* skip, const T* gate, int64_t next,
                             int valid, int channels) {
  const Lane lane = Lane::mine();
  const int corner = lane.corner<Tile>();
  char* mine = x + kBlock * lane.warp * Tile::kRowBytes;
#pragma unroll
  for (int j = 0; j < Tile::kP / 8; ++j) {
    const float2 d = *reinterpret_cast<const float2*>(skip + 8 * j + lane.col);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      auto* place = reinterpret_cast<uint32_t*>(mine + element_from<Tile::kColumns>(corner, 8 * h, j, kTokens));
      float v0 = y[4 * j + 2 * h] + d.x * low<T>(*place), v1 = y[4 * j + 2 * h + 1] + d.y * high<T>(*place);
      if (kGate && kBlock * lane.warp + 8 * h + lane.row < valid && 8 * j < channels) {
        const T* from = gate + (8 * h + lane.row) * next + 8 * j + lane.col;
        const uint32_t z = *reinterpret_cast<const uint32_t*>(from);
        v0 *= silu16(low<T>(z));
        v1 *= silu16(high<T>(z));
      }
      *place = device::pack<T>(v0, v1);
    }
  }
}

// From there to memory, in pieces of 16 bytes. `to`: y of the warp's first token.
template <typename T, typename Tile>
N3_DEVICE void store_tokens(const char* y, T* to, int64_t next, int valid, int channels) {
  constexpr int kPieces = Tile::kP / 8;  // of a row
  const int warp = threadIdx.x / 32 % 4;
  const char* mine = y + kBlock * warp * Tile::kRowBytes;
#pragma unroll
  for (int i = threadIdx.x % 32; i < kBlock * kPieces; i += 32) {
    const int row = i / kPieces, col = i % kPieces * 8;
    if (kBlock * warp + row >= valid || col >= channels) continue;
    *reinterpret_cast<uint4*>(to + row * next + col) =
        *reinterpret_cast<const uint4*>(mine + element_at<Tile::kColumns>(row, col, kTokens));
  }
}

// y of padding.
template <typename T>
N3_DEVICE void clear_tokens(const Problem& p, const Job& job) {
  const int pieces = job.channels / 8;
  T* y = static_cast<T*>(p.y) + (int64_t(job.tokens.row) * p.heads + job.tile.head) * p.head_dim + job.tile.channel;
  for (int64_t i = threadIdx.x % 128; i < int64_t(job.tokens.length) * pieces; i += 128) {
    T* to = y + i / pieces * p.heads * p.head_dim + i % pieces * 8;
    *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace n3::ssd_scan::sm90
