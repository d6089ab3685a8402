// The convolution of the next tokens of running sequences. Channels do not see each other, so an item is a tile of
// them; where no destinations are given a sequence writes only the slot it reads, and is an item of its own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/written.h"
#include "conv1d_engine.h"
#include "written_slots.h"

namespace n3::causal_conv1d {
namespace {

constexpr int64_t kTile = 512;      // channels
constexpr int64_t kGrain = 1 << 14;  // outputs of a thread at least: some 10 us

// ---- values of indices and counts

void check_below(const char* name, const Indices& indices, int64_t rows, int64_t cols, int64_t slots) {
  if (!indices.data) return;
  int64_t largest = -1;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j) largest = std::max(largest, indices(i, j));
  }
  N3_CHECK(update_op, largest < slots, name, " must be below the number of slots ", slots, ", got ", largest);
}

int64_t tokens_of(const UpdateParams& p, int64_t b) { return p.num_tokens.data ? p.num_tokens(b) : p.tokens; }

int64_t source_of(const UpdateParams& p, int64_t b) { return p.source(b, p.source_cols ? p.num_accepted(b) - 1 : 0); }

// The first wrong one token by token, as the reference finds it; those of padding may be anything.
void check_parents(const UpdateParams& p) {
  for (int64_t t = 0; p.parents.data && t < p.tokens; ++t) {
    for (int64_t b = 0; b < p.batch; ++b) {
      if (source_of(p, b) < 0 || t >= tokens_of(p, b)) continue;
      const int64_t parent = p.parents(b, t);
      N3_CHECK(update_op, parent >= -1 && parent < t, "parents must be between -1 and t - 1 for token t, got ", parent,
               " for token ", t);
    }
  }
}

void check_distinct(const UpdateParams& p) {
  mamba::WrittenSlots written;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t source = source_of(p, b);
    if (source < 0) continue;
    if (p.where == Destination::kSource) written.add(source);
    if (p.where == Destination::kLast) written.add(p.destination(b));
    for (int64_t t = 0; p.where == Destination::kEach && t < tokens_of(p, b); ++t) written.add(p.destination(b, t));
  }
  written.check(update_op, p.where == Destination::kSource ? "state_indices" : "dst_state_indices");
}

void check_values(const UpdateParams& p) {
  check_below("state_indices", p.source, p.batch, std::max<int64_t>(1, p.source_cols), p.slots);
  check_below("dst_state_indices", p.destination, p.batch, p.where == Destination::kEach ? p.tokens : 1, p.slots);
  const int64_t most = p.use == Use::kWindow ? p.tokens : p.source_cols;
  for (int64_t b = 0; p.num_accepted.data && b < p.batch; ++b) {
    const int64_t accepted = p.num_accepted(b);
    N3_CHECK(update_op, accepted >= 1 && accepted <= most, "num_accepted must be between 1 and ", most, ", got ",
             accepted);
  }
  for (int64_t b = 0; p.num_tokens.data && b < p.batch; ++b) {
    const int64_t tokens = p.num_tokens(b);
    N3_CHECK(update_op, tokens >= 0 && tokens <= p.tokens, "num_tokens must be between 0 and T=", p.tokens, ", got ",
             tokens);
  }
  check_parents(p);
  for (int64_t b = 0; p.cache_seqlens.data && b < p.batch; ++b) {
    N3_CHECK(update_op, p.cache_seqlens(b) >= 0, "cache_seqlens must be at least 0, got ", p.cache_seqlens(b));
  }
  check_distinct(p);
}

// ---- one sequence in one tile

class Updater {
 public:
  // `held`: sequences whose states are held at a time. float_y: y is float32 whatever x is.
  Updater(const UpdateParams& p, const Tiles& tiles, int64_t held, bool float_y)
      : p_(p), past_(p.taps.width - 1), width_(tiles.width()), size_(element_size(p.x.dtype)),
        y_size_(float_y ? 4 : size_),
        fir_((float_y ? kernels_.fir_to_float : kernels_.fir)[element_of(p.x.dtype)]),
        held_rows_(std::max(p.kept, past_)), taps_(kernels_, p.taps, width_), x_(kernels_, p.x, p.tokens, width_),
        held_(held * held_rows_ * width_ * size_), rows_(std::max(p.kept, past_) + p.tokens), window_(p.taps.width) {}

  // Copies what the sequence needs of its state: all of it, oldest first; in a ring or a draft window the history.
  void read(int64_t b, int64_t place, const Tile& tile) {
    const int64_t slot = source_of(p_, b);
    if (slot < 0) return;
    char* to = held_.data() + place * held_rows_ * width_ * size_;
    const auto gather = [&](int64_t column, int64_t count, int64_t row) {
      if (count <= 0) return;
      kernels_.gather[copy_kernel(p_.x.dtype)](columns_of(p_.state, slot, tile, column, count),
                                               to + row * width_ * size_, width_);
    };
    if (p_.use == Use::kRing) {
      if (past_ == 0) return;
      // Around the end: p_.kept >= past_, so in two runs at most.
      const int64_t first = ((p_.cache_seqlens(b) - past_) % p_.kept + p_.kept) % p_.kept;
      const int64_t run = std::min(past_, p_.kept - first);
      gather(first, run, 0);
      gather(0, past_ - run, run);
    } else if (p_.use == Use::kWindow && tokens_of(p_, b) > 0) {
      gather(p_.num_accepted(b) - 1, past_, 0);
    } else {
      gather(0, p_.kept, 0);
    }
  }

  void compute(int64_t b, int64_t place, const Tile& tile) {
    const int64_t tokens = source_of(p_, b) < 0 ? 0 : tokens_of(p_, b);
    const int64_t row = p_.taps.channels * y_size_;
    char* y = static_cast<char*>(p_.y) + b * p_.tokens * row + tile.first * y_size_;
    for (int64_t t = tokens; t < p_.tokens; ++t) std::memset(y + t * row, 0, tile.count * y_size_);
    if (tokens == 0) return;
    taps_.load(tile);
    find_rows(b, place, tokens, tile);
    const void* const* chain = rows_.data() + before() - past_;
    if (!p_.parents.data) return convolve(chain, y, tokens, tile);
    for (int64_t t = 0; t < tokens; ++t) {
      walk(b, t, p_.taps.width, window_.data());
      convolve(window_.data(), y + t * row, 1, tile);
    }
  }

  void write(int64_t b, int64_t place, const Tile& tile) {
    const int64_t source = source_of(p_, b), tokens = tokens_of(p_, b);
    if (source < 0 || p_.kept == 0) return;
    const int64_t slot = p_.where == Destination::kLast ? p_.destination(b) : source;
    if (p_.where != Destination::kEach && (slot < 0 || (slot == source && tokens == 0))) return;
    find_rows(b, place, tokens, tile);
    if (p_.use == Use::kRing) return write_ring(b, slot, tokens, tile);
    if (p_.use == Use::kWindow && tokens > 0) {
      return scatter(rows_.data() + 1, slot, 0, past_ - 1 + tokens, tile);  // the oldest of the history is forgotten
    }
    if (p_.where != Destination::kEach) return scatter(rows_.data() + tokens, slot, 0, p_.kept, tile);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t to = p_.destination(b, t);
      if (to < 0) continue;
      path_.resize(p_.kept);
      walk(b, t, p_.kept, path_.data());
      scatter(path_.data(), to, 0, p_.kept, tile);
    }
  }

 private:
  // Rows that read() copied for a sequence with tokens.
  int64_t before() const { return p_.use == Use::kShift ? p_.kept : past_; }

  // rows_: what read() copied, then the tokens. (A draft window without tokens was copied as a whole.)
  void find_rows(int64_t b, int64_t place, int64_t tokens, const Tile& tile) {
    const int64_t count = tokens == 0 && p_.use != Use::kRing ? p_.kept : before();
    for (int64_t i = 0; i < count; ++i) rows_[i] = held_.data() + (place * held_rows_ + i) * width_ * size_;
    x_.get(b * p_.x.strides[0], 0, tokens, tile, rows_.data() + count);
  }

  // The last `count` inputs up to token t of a sequence along its path, oldest first.
  void walk(int64_t b, int64_t t, int64_t count, const void** rows) {
    int64_t at = t, state = before();
    while (count > 0) {
      rows[--count] = rows_[at >= 0 ? before() + at : --state];
      if (at >= 0) at = p_.parents.data ? p_.parents(b, at) : at - 1;
    }
  }

  void convolve(const void* const* rows, char* y, int64_t tokens, const Tile& tile) {
    fir_({rows, taps_.weight(), taps_.bias(), y, tokens, tile.count, p_.taps.width, taps_.stride(), p_.taps.channels,
          p_.taps.silu});
  }

  void write_ring(int64_t b, int64_t slot, int64_t tokens, const Tile& tile) {
    for (int64_t t = std::max<int64_t>(0, tokens - p_.kept); t < tokens; ++t) {
      scatter(rows_.data() + past_ + t, slot, (p_.cache_seqlens(b) + t) % p_.kept, 1, tile);
    }
  }

  void scatter(const void* const* rows, int64_t slot, int64_t column, int64_t count, const Tile& tile) {
    if (count <= 0) return;
    kernels_.scatter[copy_kernel(p_.x.dtype)](rows, columns_of(p_.state, slot, tile, column, count));
  }

  const Kernels& kernels_ = kernels();
  const UpdateParams& p_;
  int64_t past_, width_, size_, y_size_;
  void (*fir_)(const Fir&);
  int64_t held_rows_;
  TileTaps taps_;
  TokenRows x_;
  std::vector<char> held_;
  std::vector<const void*> rows_, window_, path_;
};

}  // namespace

void run_update(const UpdateParams& p, bool float_y) {
  if (p.batch == 0) return;
  const Tiles tiles(p.taps.channels, kTile);
  if (p.where == Destination::kSource) {
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, p.tokens * tiles.width()));
    torch::stable::parallel_for(0, tiles.count() * p.batch, grain, [&](int64_t begin, int64_t end) {
      Updater updater(p, tiles, 1, float_y);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i % p.batch;
        const Tile tile = tiles[i / p.batch];
        updater.read(b, 0, tile);
        updater.compute(b, 0, tile);
        updater.write(b, 0, tile);
      }
    });
    return;
  }
  // A slot that is written may be another sequence's to read: all of a tile is read first.
  torch::stable::parallel_for(0, tiles.count(), 1, [&](int64_t begin, int64_t end) {
    Updater updater(p, tiles, p.batch, float_y);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t b = 0; b < p.batch; ++b) updater.read(b, b, tiles[i]);
      for (int64_t b = 0; b < p.batch; ++b) updater.compute(b, b, tiles[i]);
      for (int64_t b = 0; b < p.batch; ++b) updater.write(b, b, tiles[i]);
    }
  });
}

namespace {

Tensor update(const Tensor& x, Tensor conv_state, const Tensor& weight, const OptionalTensor& bias,
              const OptionalTensor& state_indices, const OptionalTensor& dst_state_indices,
              const OptionalTensor& num_accepted, const OptionalTensor& num_tokens, const OptionalTensor& parents,
              const OptionalTensor& cache_seqlens, const std::optional<std::string>& activation) {
  UpdateParams p = check_update(x, conv_state, weight, bias, state_indices, dst_state_indices, num_accepted,
                                num_tokens, parents, cache_seqlens, activation);
  check_written(update_op, "conv_state", conv_state);
  const Tensor y = torch::stable::new_empty(x, x.sizes());
  p.y = y.mutable_data_ptr();
  check_values(p);
  run_update(p, false);
  return y;
}

}  // namespace
}  // namespace n3::causal_conv1d

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) {
  m.impl("causal_conv1d_update", TORCH_BOX(&n3::causal_conv1d::update));
}
