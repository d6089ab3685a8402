// ssd_scan on sm_90: all chunks of a head in one block, the state in registers from the first token to the last.
//
// Per tile (a head, or kP of its channels) and chunk of 64 tokens i, j, with S the state that enters, float32:
//   M_ij = (C_i . B_j) decay_ij dt_j  for j <= i, else 0            product 1, rounded to 16 bits in registers
//   Y    = start_i (C S^T) + M x                                    products 2 and 3, S rounded to 16 bits
//   S^T <- whole S^T + B^T (end_j x_j)                              product 4, end_j x_j rounded to 16 bits
//   y    = (Y + D x) silu(z)
// All four accumulate in float32. With float16 inputs, what is rounded must stay below 65504: beyond, it is infinite,
// and the result with it. The factors are those of ssd_scan_decay.h: a warp holds rows 16 w .. 16 w + 15 of M, which
// are block w, so that every column block is wholly before, in or behind it.
#pragma once
#include "../common/hopper.cuh"
#include "ssd_scan_plan.h"
#include "views.cuh"

namespace n3::ssd_scan::sm90 {

using mamba::IndexView;
using mamba::View;

struct Problem {
  Work work;
  const void* z;  // null: no gate
  int64_t z_strides[3];  // sequence, token, head; its channels are neighbours
  void* y;               // contiguous
  View dt;               // sequence, token, head
  View A, D, dt_bias;    // head; D also channel
  View initial, final;   // slot, head, channel, state dimension; null `initial`: zeros
  IndexView state_indices, cu_seqlens, checkpoint_tokens, checkpoint_indices;
  const uint8_t* has_initial;  // null: every sequence
  int64_t has_initial_stride;
  int32_t sequences, length, tokens;  // length: of every sequence, where cu_seqlens is null
  int32_t slots, checkpoints;
  int32_t heads, head_dim, d_state;
  float dt_min, dt_max;
  bool dt_softplus;
};

template <typename T>
N3_DEVICE float low(uint32_t pair) {
  return device::widen(T{uint16_t(pair)});
}
template <typename T>
N3_DEVICE float high(uint32_t pair) {
  return device::widen(T{uint16_t(pair >> 16)});
}

// Where the tokens of a sequence are.
struct Tokens {
  int32_t batch;          // index of the sequence in the operands; packed: 0
  int32_t first, length;  // packed: of all tokens, which are fewer than 2^31
  int32_t row;            // of y, and of checkpoints: tokens before the first
  int32_t slot;           // of the state; negative: padding, y is zero and nothing else is touched

  N3_DEVICE int32_t chunks() const { return slot < 0 ? 0 : length / kTokens + (length % kTokens != 0); }
};

// The values of indices are checked on the CPU only. Here nothing is touched out of range: ends outside the tokens are
// moved inside, and a slot that does not exist is padding.
N3_DEVICE int32_t slot_of(const Problem& p, const IndexView& indices, int64_t i) {
  const int64_t slot = indices(i);
  return slot >= 0 && slot < p.slots ? int32_t(slot) : -1;
}

N3_DEVICE Tokens tokens_of(const Problem& p, int32_t sequence) {
  if (!p.cu_seqlens.data) {
    return {sequence, 0, p.length, sequence * p.length, slot_of(p, p.state_indices, sequence)};
  }
  const auto end = [&](int32_t i) { return int32_t(mamba::clamp(p.cu_seqlens(i), 0, p.tokens)); };
  const int32_t first = end(sequence);
  if (sequence == p.sequences) return {0, first, p.tokens - first, first, -1};  // behind the last sequence
  const int32_t last = end(sequence + 1);
  return {0, first, last > first ? last - first : 0, first, slot_of(p, p.state_indices, sequence)};
}

// One tile of an item.
struct Job {
  Tokens tokens;
  TileAt tile;
  int32_t sequence, channels;  // channels: that exist
};

template <typename Tile>
N3_DEVICE Job job_at(const Problem& p, int32_t index, int which) {
  const Item item = item_at(p.work, index);
  const TileAt tile = tile_at(p.work, item, which, Tile::kP);
  const int rest = p.head_dim - tile.channel;
  return {tokens_of(p, item.sequence), tile, item.sequence, rest < Tile::kP ? rest : Tile::kP};
}

// Barriers: of a stage's operands, of its decays, and of its release.
struct Stages {
  hopper::Barrier *landed, *ready, *empty;
};

// The stage of the n-th chunk of a block, and how often it was used before.
template <int kStages>
struct Position {
  int stage = 0;
  uint32_t parity = 0;

  N3_DEVICE void next() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// ---------------------------------------------------------------- the warp that loads, and those that make decays

template <typename Tile>
N3_DEVICE void load_operands(char* memory, const Stages& stages, const Problem& p, const hopper::TensorMap* x_map,
                             const hopper::TensorMap* b_map, const hopper::TensorMap* c_map) {
  using S = Shared<Tile>;
  Position<S::kStages> at;
  for (int32_t i = blockIdx.x; i < p.work.items; i += gridDim.x) {
    const Item item = item_at(p.work, i);
    const Tokens tokens = tokens_of(p, item.sequence);
    int present = 0;
    for (int w = 0; w < Tile::kWarpgroups; ++w) present += tile_at(p.work, item, w, Tile::kP).exists;
    for (int32_t chunk = 0; chunk < tokens.chunks(); ++chunk, at.next()) {
      const int token = tokens.first + chunk * kTokens;
      hopper::Barrier* landed = stages.landed + at.stage;
      hopper::wait(stages.empty + at.stage, at.parity ^ 1);
      hopper::arrive_expecting(landed, 2 * S::kB + present * S::kX);
      for (int s = 0; s < Tile::kSubtiles; ++s) {
        const int bytes = s * kTokens * 128;
        hopper::load_tile(memory + S::c_at(at.stage) + bytes, c_map, landed, 64 * s, item.group, token, tokens.batch);
        hopper::load_tile(memory + S::b_at(at.stage) + bytes, b_map, landed, 64 * s, item.group, token, tokens.batch);
      }
      for (int w = 0; w < Tile::kWarpgroups; ++w) {
        const TileAt tile = tile_at(p.work, item, w, Tile::kP);
        if (!tile.exists) continue;
        for (int c = 0; c < Tile::kP; c += Tile::kColumns) {
          hopper::load_tile(memory + S::x_at(at.stage, w) + c * kTokens * 2, x_map, landed, tile.channel + c, tile.head,
                            token, tokens.batch);
        }
      }
    }
  }
}

// Fills `to` from dt of 64 tokens, by one warp; lane l holds tokens 2 l and 2 l + 1. A sum depends on what comes before
// it alone, so that a chunk that ends early has the sums of one that does not.
N3_DEVICE void make_decays(Decays& to, float A, float dt0, float dt1, int valid) {
  const int lane = threadIdx.x % 32;
  const float first = log2_decay(A, dt0);
  float sum = first + log2_decay(A, dt1);
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const float before = __shfl_up_sync(0xffffffffu, sum, by);
    if (lane >= by) sum = before + sum;
  }
  const float before = __shfl_up_sync(0xffffffffu, sum, 1);
  to.a[2 * lane] = lane ? before + first : first;
  to.a[2 * lane + 1] = sum;
  to.dt[2 * lane] = dt0;
  to.dt[2 * lane + 1] = dt1;
  __syncwarp();
  const float last = to.a[valid - 1];
#pragma unroll
  for (int i = lane; i < kTokens; i += 32) {
    const float a = to.a[i];
    to.start[i] = exp2f(a);
    if (i >= kBlock) to.row[i] = row_factor(a, to.a[i / kBlock * kBlock - 1]);
    to.end[i] = i < valid ? end_factor(a, last, to.dt[i]) : 0.f;
  }
#pragma unroll
  for (int i = lane; i < kColumnFactors; i += 32) {
    const int block = i < first_column(2) ? 1 : i < first_column(3) ? 2 : 3, j = i - first_column(block);
    to.column[i] = column_factor(to.a[j], to.a[block * kBlock - 1], to.dt[j]);
  }
  if (lane == 0) to.whole = exp2f(last);
}

// What lies in a row behind the end of the sequence belongs to another one, or to nobody, and may be NaN: 0 * NaN.
N3_DEVICE void clear_rows(char* tile, int row_bytes, int blocks, int valid) {
  const int words = (kTokens - valid) * row_bytes / 16;
  for (int b = 0; b < blocks; ++b) {
    uint4* from = reinterpret_cast<uint4*>(tile + (b * kTokens + valid) * row_bytes);
    for (int i = threadIdx.x % 32; i < words; i += 32) from[i] = make_uint4(0, 0, 0, 0);
  }
}

template <typename Tile>
N3_DEVICE void prepare_decays(char* memory, const Stages& stages, const Problem& p, int which) {
  using S = Shared<Tile>;
  const int lane = threadIdx.x % 32;
  Position<S::kStages> at;
  for (int32_t i = blockIdx.x; i < p.work.items; i += gridDim.x) {
    const Item item = item_at(p.work, i);
    const Tokens tokens = tokens_of(p, item.sequence);
    const TileAt tile = tile_at(p.work, item, which, Tile::kP);
    const int32_t chunks = tokens.chunks();
    float A = 0.f, bias = 0.f, raw[2] = {0.f, 0.f};
    const auto fetch = [&](int32_t chunk) {  // ahead of its use by a chunk
      for (int e = 0; e < 2; ++e) {
        const int64_t token = int64_t(chunk) * kTokens + 2 * lane + e;
        if (chunk < chunks && token < tokens.length) {
          raw[e] = mamba::load(p.dt, mamba::offset(p.dt, tokens.batch, tokens.first + token, tile.head));
        }
      }
    };
    if (tile.exists && chunks) {
      A = mamba::load(p.A, tile.head * p.A.strides[0]);
      if (p.dt_bias.data) bias = mamba::load(p.dt_bias, tile.head * p.dt_bias.strides[0]);
      fetch(0);
    }
    for (int32_t chunk = 0; chunk < chunks; ++chunk, at.next()) {
      const int left = tokens.length - chunk * kTokens, valid = left < kTokens ? left : kTokens;
      hopper::wait(stages.empty + at.stage, at.parity ^ 1);
      if (tile.exists) {
        float dt[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float step = mamba::time_step(raw[e] + bias, p.dt_softplus, p.dt_min, p.dt_max);
          dt[e] = 2 * lane + e < valid ? step : 0.f;
        }
        fetch(chunk + 1);
        char* decays = memory + S::kDecaysAt + at.stage * S::kDecays;
        make_decays(reinterpret_cast<Decays*>(decays)[which], A, dt[0], dt[1], valid);
      }
      if (valid < kTokens) {
        hopper::wait(stages.landed + at.stage, at.parity);
        if (tile.exists) {
          clear_rows(memory + S::x_at(at.stage, which), Tile::kRowBytes, Tile::kP / Tile::kColumns, valid);
        }
        if (which == 0) clear_rows(memory + S::b_at(at.stage), 128, Tile::kSubtiles, valid);
        hopper::fence_async();
      }
      __syncwarp();
      if (lane == 0) hopper::arrive(stages.ready + at.stage);
    }
  }
}

// ---------------------------------------------------------------- the warpgroups that compute

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

// The states after chosen tokens of this chunk: what the last token of a sequence that ended there would leave, by the
// same operations on a copy, 64 dimensions at a time. The copy passes through the scratch: so the weighted x is made
// anew each time, and the 16-bit state at the end.
template <typename T, typename Tile>
N3_DEVICE void store_checkpoints(const Problem& p, const State<Tile>& s, const Decays& d, const char* b, const char* x,
                                 char* narrow_state, char* weighted, float* scratch, const Job& job, int32_t chunk,
                                 int barrier) {
  const int first = job.tokens.row + chunk * kTokens, valid = job.tokens.length - chunk * kTokens;
  bool any = false;
  for (int from = 0; from < p.checkpoints; from += 32) {
    const int mine = from + threadIdx.x % 32;
    const int64_t after = mine < p.checkpoints ? p.checkpoint_tokens(mine) - first : -1;
    const bool here = after >= 0 && after < kTokens && after < valid && slot_of(p, p.checkpoint_indices, mine) >= 0;
    // Every warp asks the same questions: the warpgroup stays together.
    for (uint32_t found = __ballot_sync(0xffffffffu, here); found; found &= found - 1) {
      const int c = from + __ffs(found) - 1;
      const int last = int(p.checkpoint_tokens(c) - first);
      const float sum = d.a[last], whole = exp2f(sum);
      any = true;
#pragma unroll
      for (int m = 0; m < Tile::kSubtiles; ++m) {
        weight_tokens<T, Tile>(x, weighted, [&](int j) { return j <= last ? end_factor(d.a[j], sum, d.dt[j]) : 0.f; });
        hopper::fence_async();
        float copy[Tile::kP / 2];
#pragma unroll
        for (int i = 0; i < Tile::kP / 2; ++i) copy[i] = s[m][i] * whole;
        hopper::sync_warpgroup(barrier);
        hopper::pin(copy);
        hopper::fence_products();
        add_tokens<T, Tile>(copy, b, weighted, m);
        hopper::commit_products();
        hopper::wait_products<0>();
        hopper::pin(copy);
        hopper::sync_warpgroup(barrier);  // nobody reads the weighted x any more
        const int32_t slot = slot_of(p, p.checkpoint_indices, c);
        store_block<Tile::kP>(p, copy, state_rows(p.final, job, slot, m), scratch);
        hopper::sync_warpgroup(barrier);
      }
    }
  }
  if (!any) return;
  publish_state<T, Tile>(s, narrow_state);
  hopper::fence_async();
  hopper::sync_warpgroup(barrier);
}

template <typename T, typename Tile>
N3_DEVICE void scan_tiles(char* memory, const Stages& stages, const Problem& p, int which) {
  using S = Shared<Tile>;
  using Products = hopper::Product<T, Tile::kP>;
  constexpr hopper::Major kK = hopper::Major::kK, kMN = hopper::Major::kMN;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, barrier = 1 + which;
  char* narrow_state = memory + S::state_at(which);
  char* weighted = memory + S::weighted_at(which);
  float* scratch = reinterpret_cast<float*>(narrow_state + warp * S::kScratch);
  float* skip = reinterpret_cast<float*>(memory + S::kSkipAt) + which * Tile::kP;
  Position<S::kStages> at;
  for (int32_t i = blockIdx.x; i < p.work.items; i += gridDim.x) {
    const Job job = job_at<Tile>(p, i, which);
    const int32_t chunks = job.tokens.chunks(), length = job.tokens.length, channels = job.channels;
    if (!job.tile.exists) {  // keeps step with the other warpgroup
      for (int32_t chunk = 0; chunk < chunks; ++chunk, at.next()) {
        hopper::wait(stages.ready + at.stage, at.parity);
        hopper::wait(stages.landed + at.stage, at.parity);
        if (lane == 0) hopper::arrive(stages.empty + at.stage);
      }
      continue;
    }
    if (job.tokens.slot < 0) {
      clear_tokens<T>(p, job);
      continue;
    }
    const bool given = p.initial.data && (!p.has_initial || p.has_initial[job.sequence * p.has_initial_stride]);
    State<Tile> s;
#pragma unroll
    for (int m = 0; m < Tile::kSubtiles; ++m) {
#pragma unroll
      for (int e = 0; e < Tile::kP / 2; ++e) s[m][e] = 0.f;
      if (given) load_block<Tile::kP>(p, s[m], state_rows(p.initial, job, job.tokens.slot, m), scratch);
    }
    if (chunks) {
      hopper::sync_warpgroup(barrier);  // the scratch is where the 16-bit state goes
      for (int c = threadIdx.x % 128; c < Tile::kP; c += 128) {
        const bool inside = p.D.data && c < channels;
        skip[c] = inside ? mamba::load(p.D, mamba::offset(p.D, job.tile.head, job.tile.channel + c)) : 0.f;
      }
      publish_state<T, Tile>(s, narrow_state);
      hopper::fence_async();
      hopper::sync_warpgroup(barrier);
    }
    // Of this warp's first token, chunk after chunk.
    const int64_t next = int64_t(p.heads) * p.head_dim, row = job.tokens.row + kBlock * warp;
    T* y_at = static_cast<T*>(p.y) + row * next + job.tile.head * p.head_dim + job.tile.channel;
    const T* z_at = static_cast<const T*>(p.z);
    if (z_at) {
      z_at += job.tokens.batch * p.z_strides[0] + (job.tokens.first + kBlock * warp) * p.z_strides[1] +
              job.tile.head * p.z_strides[2] + job.tile.channel;
    }
    for (int32_t chunk = 0; chunk < chunks; ++chunk, at.next()) {
      const int left = length - chunk * kTokens, valid = left < kTokens ? left : kTokens;
      const char* b = memory + S::b_at(at.stage);
      const char* c = memory + S::c_at(at.stage);
      char* x = memory + S::x_at(at.stage, which);
      const Decays& d = reinterpret_cast<const Decays*>(memory + S::kDecaysAt + at.stage * S::kDecays)[which];
      hopper::wait(stages.ready + at.stage, at.parity);
      hopper::wait(stages.landed + at.stage, at.parity);
      if (p.checkpoints) {
        store_checkpoints<T, Tile>(p, s, d, b, x, narrow_state, weighted, scratch,
                                   job_at<Tile>(p, hopper::forgotten(i), which), chunk, barrier);
      }

      float scores[32], y[Tile::kP / 2];
      hopper::fence_products();
#pragma unroll
      for (int k = 0; k < Tile::kN / 16; ++k) {
        hopper::Product<T, kTokens>::template shared<kK, kK>(scores, dimensions_at(c, k), dimensions_at(b, k), k > 0);
      }
      hopper::commit_products();
#pragma unroll
      for (int k = 0; k < Tile::kN / 16; ++k) {
        Products::template shared<kK, kMN>(y, dimensions_at(c, k), channels_at<Tile>(narrow_state, k, Tile::kN), k > 0);
      }
      hopper::commit_products();

      // Under the first two products: the operands of the fourth.
      weight_tokens<T, Tile>(x, weighted, [&](int j) { return d.end[j]; });
      hopper::fence_async();
      const float whole = d.whole;
#pragma unroll
      for (int m = 0; m < Tile::kSubtiles; ++m) {
#pragma unroll
        for (int e = 0; e < Tile::kP / 2; ++e) s[m][e] *= whole;
      }
      hopper::wait_products<1>();
      hopper::pin(scores);
      uint32_t m[4][4];
      decay_scores<T>(d, scores, m);
      const float start[2] = {d.start[kBlock * warp + lane / 4], d.start[kBlock * warp + 8 + lane / 4]};
      hopper::sync_warpgroup(barrier);  // all of the weighted x is there
      hopper::wait_products<0>();
      hopper::pin(y);
#pragma unroll
      for (int e = 0; e < Tile::kP / 2; ++e) y[e] *= start[e / 2 % 2];

      hopper::pin(y);
#pragma unroll
      for (int block = 0; block < Tile::kSubtiles; ++block) hopper::pin(s[block]);
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) hopper::pin(m[k]);
      hopper::fence_products();
#pragma unroll
      for (int k = 0; k < kTokens / 16; ++k) {
        Products::template registers<kMN>(y, m[k], channels_at<Tile>(x, k, kTokens), true);
      }
      hopper::commit_products();
#pragma unroll
      for (int block = 0; block < Tile::kSubtiles; ++block) add_tokens<T, Tile>(s[block], b, weighted, block);
      hopper::commit_products();
      hopper::wait_products<1>();
      hopper::pin(y);
      hopper::sync_warpgroup(barrier);  // nobody reads x as an operand any more, nor the 16-bit state
      if (z_at) {
        finish_tokens<true, T, Tile>(y, x, skip, z_at, p.z_strides[1], valid, channels);
        z_at += kTokens * p.z_strides[1];
      } else {
        finish_tokens<false, T, Tile>(y, x, skip, nullptr, 0, valid, channels);
      }
      __syncwarp();
      store_tokens<T, Tile>(x, y_at, int64_t(p.heads) * p.head_dim, valid, channels);
      y_at += kTokens * (int64_t(p.heads) * p.head_dim);
      hopper::wait_products<0>();
#pragma unroll
      for (int block = 0; block < Tile::kSubtiles; ++block) hopper::pin(s[block]);
      if (chunk + 1 < chunks) publish_state<T, Tile>(s, narrow_state);
      hopper::fence_async();  // of the 16-bit state before product 2, of y in the place of x before the next copy
      __syncwarp();
      if (lane == 0) hopper::arrive(stages.empty + at.stage);
      hopper::sync_warpgroup(barrier);
    }
    const Job again = job_at<Tile>(p, hopper::forgotten(i), which);
#pragma unroll
    for (int m = 0; m < Tile::kSubtiles; ++m) {
      store_block<Tile::kP>(p, s[m], state_rows(p.final, again, again.tokens.slot, m), scratch);
    }
  }
}

//   grid  plan().blocks, at most one per multiprocessor     block  Tile::kThreads: kWarpgroups that compute, then one
//   whose warp 0 loads and whose warps 1, 2 make the decays   smem  Shared<Tile>, dynamic
// With two computing warpgroups, one's arithmetic runs beside the other's products; nothing else joins them but the
// stages that they share. 216 and 72 registers per thread are 504 for three threads, what 168 at the launch give.
template <typename T, typename Tile>
__global__ __launch_bounds__(Tile::kThreads, 1) void tensor_scan_kernel_sm90(
    const __grid_constant__ hopper::TensorMap x_map, const __grid_constant__ hopper::TensorMap b_map,
    const __grid_constant__ hopper::TensorMap c_map, const __grid_constant__ Problem p) {
  using S = Shared<Tile>;
  char* memory = hopper::shared_memory();
  auto* barriers = reinterpret_cast<hopper::Barrier*>(memory + S::kBarriersAt);
  const Stages stages{barriers, barriers + kMostStages, barriers + 2 * kMostStages};
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      hopper::init_barrier(stages.landed + i, 1);
      hopper::init_barrier(stages.ready + i, Tile::kWarpgroups);
      hopper::init_barrier(stages.empty + i, 4 * Tile::kWarpgroups);
    }
    hopper::publish_barriers();
  }
  __syncthreads();
  // From one lane, that the compiler sees that a warp agrees: descriptors then live in uniform registers.
  const int group = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0), warp = threadIdx.x / 32 % 4;
  if (group == Tile::kWarpgroups) {
    if constexpr (Tile::kWarpgroups == 2) hopper::give_registers<72>();
    if (warp == 0) {
      if (threadIdx.x % 32 == 0) load_operands<Tile>(memory, stages, p, &x_map, &b_map, &c_map);
    } else if (warp <= Tile::kWarpgroups) {
      prepare_decays<Tile>(memory, stages, p, warp - 1);
    }
  } else {
    if constexpr (Tile::kWarpgroups == 2) hopper::take_registers<216>();
    scan_tiles<T, Tile>(memory, stages, p, Tile::kWarpgroups == 1 ? 0 : group);
  }
}

}  // namespace n3::ssd_scan::sm90
