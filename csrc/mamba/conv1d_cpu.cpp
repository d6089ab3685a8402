// The convolution of prompts. Outputs are computed in items of a tile of channels and some tokens, whose windows begin
// in the initial state for the first of them; then the states are kept, which are the last inputs of what came before.
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/written.h"
#include "conv1d_engine.h"
#include "written_slots.h"

#define N3_LANES 4  // the vectors every x86-64 and AArch64 has
#include "conv1d_lanes.h"

namespace n3::causal_conv1d {

const Kernels kGenericKernels = kKernels;

const Kernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::kAmx:
    case Isa::kAvx512: return kAvx512Kernels;
    case Isa::kAvx2: return kAvx2Kernels;
    case Isa::kGeneric: break;
  }
#endif
  return kGenericKernels;
}

namespace {

constexpr int64_t kTile = 512;  // channels: kTokens + width - 1 rows, as many outputs and the taps stay in the L1 cache
constexpr int64_t kPiece = 64;  // tokens of an item: some 20 us

// ---- outputs

// Tokens first .. first + count of a sequence.
struct Piece {
  const Sequence* sequence;
  int64_t first, count;
};

// A thread's memory for one item at a time.
class Convolver {
 public:
  Convolver(const Params& p, const Tiles& tiles)
      : p_(p), past_(p.taps.width - 1), width_(tiles.width()), size_(element_size(p.x.dtype)),
        taps_(kernels_, p.taps, width_), x_(kernels_, p.x, kPiece + past_, width_), history_(past_ * width_ * size_),
        rows_(kPiece + past_) {}

  void run(const Piece& piece, const Tile& tile) {
    taps_.load(tile);
    const Sequence& s = *piece.sequence;
    const int64_t before = std::max<int64_t>(0, past_ - piece.first);  // rows of the window that are in the state
    if (before) read_history(s, tile);
    for (int64_t i = 0; i < before; ++i) rows_[i] = history_.data() + (piece.first + i) * width_ * size_;
    x_.get(s.offset, piece.first - past_ + before, piece.count + past_ - before, tile, rows_.data() + before);
    char* y = static_cast<char*>(p_.y) + ((s.row + piece.first) * p_.taps.channels + tile.first) * size_;
    kernels_.fir[element_of(p_.x.dtype)]({rows_.data(), taps_.weight(), taps_.bias(), y, piece.count, tile.count,
                                                 p_.taps.width, taps_.stride(), p_.taps.channels, p_.taps.silu});
  }

 private:
  void read_history(const Sequence& s, const Tile& tile) {
    if (!s.initial) {
      std::fill(history_.begin(), history_.end(), char(0));
      return;
    }
    kernels_.gather[copy_kernel(p_.x.dtype)](columns_of(p_.initial, s.slot, tile, p_.kept - past_, past_),
                                             history_.data(), width_);
  }

  const Kernels& kernels_ = kernels();
  const Params& p_;
  int64_t past_, width_, size_;
  TileTaps taps_;
  TokenRows x_;
  std::vector<char> history_;
  std::vector<const void*> rows_;
};

void convolve(const Params& p, const std::vector<Sequence>& sequences) {
  std::vector<Piece> pieces;
  for (const Sequence& s : sequences) {
    for (int64_t t = 0; s.slot >= 0 && t < s.length; t += kPiece) {
      pieces.push_back({&s, t, std::min(kPiece, s.length - t)});
    }
  }
  const Tiles tiles(p.taps.channels, kTile);
  const int64_t count = int64_t(pieces.size());
  torch::stable::parallel_for(0, tiles.count() * count, 1, [&](int64_t begin, int64_t end) {
    Convolver convolver(p, tiles);
    for (int64_t i = begin; i < end; ++i) convolver.run(pieces[i % count], tiles[i / count]);
  });
}

// ---- states

class Keeper {
 public:
  Keeper(const Params& p, const Tiles& tiles)
      : p_(p), width_(tiles.width()), size_(element_size(p.x.dtype)), x_(kernels_, p.x, p.kept, width_),
        before_((p.kept + 1) * width_ * size_), rows_(p.kept) {}

  // The state of the sequence's slot is read once, before the first of its states is written.
  void run(const Sequence& s, const Tile& tile) {
    if (s.initial) {
      kernels_.gather[copy_kernel(p_.x.dtype)](columns_of(p_.initial, s.slot, tile, 0, p_.kept), before_.data(),
                                               width_);
    }
    for (const Checkpoint& c : s.checkpoints) keep(s, c.tokens, c.slot, tile);
    keep(s, s.length, s.slot, tile);
  }

 private:
  void keep(const Sequence& s, int64_t tokens, int64_t slot, const Tile& tile) {
    const int64_t old = std::max<int64_t>(0, p_.kept - tokens);  // inputs that were there before the sequence
    for (int64_t i = 0; i < old; ++i) {
      rows_[i] = before_.data() + (s.initial ? tokens + i : p_.kept) * width_ * size_;  // the last row is zeros
    }
    x_.get(s.offset, tokens - p_.kept + old, p_.kept - old, tile, rows_.data() + old);
    kernels_.scatter[copy_kernel(p_.x.dtype)](rows_.data(), columns_of(p_.final, slot, tile, 0, p_.kept));
  }

  const Kernels& kernels_ = kernels();
  const Params& p_;
  int64_t width_, size_;
  TokenRows x_;
  std::vector<char> before_;
  std::vector<const void*> rows_;
};

// ---- operators

void run(const Params& p) {
  const std::vector<Sequence> sequences = sequences_of(p);
  mamba::check_distinct(op, sequences);
  clear_padding(p, sequences, p.taps.channels, p.y);
  convolve(p, sequences);
  keep_states(p, sequences);
}

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                   const OptionalTensor& initial_state, const OptionalTensor& cu_seqlens,
                                   const std::optional<std::string>& activation) {
  Params p = check(x, weight, bias, initial_state, cu_seqlens, activation);
  const Tensor y = torch::stable::new_empty(x, x.sizes());
  const Tensor final_state = torch::stable::new_empty(x, {p.sequences, p.taps.channels, p.kept});
  p.y = y.mutable_data_ptr();
  p.final = mamba::operand_of(final_state);
  run(p);
  return {y, final_state};
}

Tensor forward_slots(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, Tensor conv_state,
                     const Tensor& state_indices, const OptionalTensor& has_initial, const OptionalTensor& cu_seqlens,
                     const OptionalTensor& checkpoint_tokens, const OptionalTensor& checkpoint_indices,
                     const std::optional<std::string>& activation) {
  Params p = check_slots(x, weight, bias, conv_state, state_indices, has_initial, cu_seqlens, checkpoint_tokens,
                         checkpoint_indices, activation);
  check_written(op, "conv_state", conv_state);
  const Tensor y = torch::stable::new_empty(x, x.sizes());
  p.y = y.mutable_data_ptr();
  run(p);
  return y;
}

}  // namespace

std::vector<Sequence> sequences_of(const Params& p) {
  mamba::check_prefill_values(op, "x", p);
  std::vector<Sequence> sequences(p.sequences);
  const bool* has_initial = static_cast<const bool*>(p.has_initial.data);
  for (int64_t s = 0; s < p.sequences; ++s) {
    const bool packed = p.cu_seqlens.data;
    const int64_t first = packed ? p.cu_seqlens(s) : 0;
    const bool initial = p.initial.data && (!has_initial || has_initial[s * p.has_initial.strides[0]]);
    sequences[s] = {packed ? p.cu_seqlens(s + 1) - first : p.length, packed ? first : s * p.length,
                    s * p.x.strides[0] + first * p.x.strides[1], p.state_indices(s), initial, {}};
  }
  for (int64_t k = 0; k < p.checkpoints; ++k) {
    const int64_t token = p.checkpoint_tokens(k), slot = p.checkpoint_indices(k);
    // The last sequence that begins at the token or before it, of which empty ones come first.
    const auto after = std::upper_bound(sequences.begin(), sequences.end(), token,
                                        [](int64_t t, const Sequence& s) { return t < s.row; });
    if (slot < 0 || after == sequences.begin()) continue;
    Sequence& owner = *std::prev(after);
    if (token < owner.row + owner.length) owner.checkpoints.push_back({token - owner.row + 1, slot});
  }
  return sequences;
}

void clear_padding(const Params& p, const std::vector<Sequence>& sequences, int64_t channels, void* y) {
  const int64_t row_bytes = channels * element_size(p.x.dtype);
  const auto clear = [&](int64_t row, int64_t count) {
    if (count > 0 && row_bytes > 0) std::memset(static_cast<char*>(y) + row * row_bytes, 0, count * row_bytes);
  };
  for (const Sequence& s : sequences) {
    if (s.slot < 0) clear(s.row, s.length);
  }
  const int64_t end = sequences.empty() ? 0 : sequences.back().row + sequences.back().length;
  clear(end, p.tokens - end);
}

void keep_states(const Params& p, const std::vector<Sequence>& sequences) {
  if (p.kept == 0) return;
  const Tiles tiles(p.taps.channels, kTile);
  const int64_t count = tiles.count();
  torch::stable::parallel_for(0, count * p.sequences, 8, [&](int64_t begin, int64_t end) {
    Keeper keeper(p, tiles);
    for (int64_t i = begin; i < end; ++i) {
      if (sequences[i / count].slot >= 0) keeper.run(sequences[i / count], tiles[i % count]);
    }
  });
}

}  // namespace n3::causal_conv1d

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&n3::causal_conv1d::forward));
  m.impl("causal_conv1d.slots", TORCH_BOX(&n3::causal_conv1d::forward_slots));
}
