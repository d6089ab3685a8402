// ssd_scan on sm_90: the problem, where its tokens are, and how warps hand stages of operands to each other.
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

}  // namespace n3::ssd_scan::sm90
