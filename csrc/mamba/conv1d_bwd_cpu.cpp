// Gradients of the convolution of prompts. An item is a tile of channels and a block of pieces of sequences: their dpre
// is kept for as many tokens as the kernel takes at a time, dx follows width - 1 tokens behind as the convolution of
// dpre with the taps in reverse, and the sums over tokens are the block's. Blocks depend on the problem alone and are
// added in their order, so that no bit depends on the threads.
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "conv1d_engine.h"

namespace n3::causal_conv1d {
namespace {

constexpr int64_t kTile = 256;         // channels
constexpr int64_t kStep = 32;          // tokens at a time: dpre of a tile stays in the L1 cache
constexpr int64_t kBlockTokens = 256;  // of a block at least
constexpr int64_t kBlocks = 128;       // and so many blocks at most, about, each with a row of sums per tap

// Tokens first .. first + count of a sequence. What they give of dx needs dpre of the tokens behind them too.
struct Piece {
  const Sequence* sequence;
  int64_t number, first, count;
};

using Block = std::vector<Piece>;

std::vector<Block> blocks_of(const std::vector<Sequence>& sequences, int64_t tokens) {
  const int64_t most = std::max(kBlockTokens, (tokens + kBlocks - 1) / kBlocks);
  std::vector<Block> blocks;
  int64_t room = 0;
  for (int64_t s = 0; s < int64_t(sequences.size()); ++s) {
    int64_t t = 0;
    do {  // a sequence without tokens has a piece as well: its final state is its initial one
      if (room == 0) blocks.emplace_back(), room = most;
      const int64_t count = std::min(room, sequences[s].length - t);
      blocks.back().push_back({&sequences[s], s, t, count});
      t += count, room -= count;
    } while (t < sequences[s].length);
  }
  return blocks;
}

class Differentiator {
 public:
  Differentiator(const BackwardParams& b, const Tiles& tiles)
      : b_(b), p_(b.forward), past_(p_.taps.width - 1), step_(std::max(kStep, past_)), ring_(step_ + past_),
        width_(tiles.width()), size_(element_size(p_.x.dtype)), taps_(kernels_, p_.taps, width_),
        x_(kernels_, p_.x, step_ + past_, width_), grad_y_(kernels_, b.grad_y, step_, width_),
        history_(past_ * width_ * size_), d_initial_(past_ * width_ * size_), grad_final_raw_(past_ * width_ * size_),
        grad_final_(past_ * width_), dpre_((ring_ + 1) * width_), sums_((p_.taps.width + 1) * width_),
        unused_(sums_.size()), x_rows_(ring_), grad_y_rows_(step_), dpre_rows_(step_), window_(ring_ + past_) {}

  // Adds to `partial` [width + 1, channels].
  void run(const Piece& piece, const Tile& tile, float* partial) {
    const Sequence& s = *piece.sequence;
    taps_.load(tile);
    sequence_ = piece.number;
    length_ = s.length;
    const int64_t end = piece.first + piece.count;
    if (piece.first < past_) read_history(s, tile);
    if (b_.grad_final.data && end > length_ - past_) read_grad_final(tile);

    next_ = piece.first == 0 && b_.d_initial ? -past_ : piece.first;
    for (int64_t t = piece.first; t < end; t += step_) {
      const int64_t count = std::min(step_, end - t);
      std::fill(sums_.begin(), sums_.end(), 0.f);
      slope(s, t, count, tile, sums_.data());
      for (int64_t k = 0; k <= p_.taps.width; ++k) {
        float* to = partial + k * p_.taps.channels + tile.first;
        for (int64_t c = 0; c < tile.count; ++c) to[c] += sums_[k * width_ + c];
      }
      write_dx(s, t + count - past_, tile);
    }
    const int64_t behind = std::min(past_, length_ - end);
    if (behind > 0) slope(s, end, behind, tile, unused_.data());
    write_dx(s, end, tile);
    if (piece.first == 0 && b_.d_initial) write_d_initial(tile);
  }

 private:
  char* row(std::vector<char>& rows, int64_t i) { return rows.data() + i * width_ * size_; }
  float* dpre(int64_t token) {  // zeros where there is no such token
    return dpre_.data() + (token >= 0 && token < length_ ? token % ring_ : ring_) * width_;
  }

  void read_history(const Sequence& s, const Tile& tile) {
    if (!p_.initial.data) return;  // zeros
    kernels_.gather[copy_kernel(p_.x.dtype)](columns_of(p_.initial, s.slot, tile, 0, past_), history_.data(), width_);
  }

  void read_grad_final(const Tile& tile) {
    kernels_.gather[copy_kernel(p_.x.dtype)](columns_of(b_.grad_final, sequence_, tile, 0, past_),
                                             grad_final_raw_.data(), width_);
    for (int64_t i = 0; i < past_; ++i) {
      kernels_.to_float[element_of(p_.x.dtype)](row(grad_final_raw_, i), grad_final_.data() + i * width_,
                                                       tile.count);
    }
  }

  void slope(const Sequence& s, int64_t t, int64_t count, const Tile& tile, float* sums) {
    const int64_t before = std::max<int64_t>(0, past_ - t);
    for (int64_t i = 0; i < before; ++i) x_rows_[i] = row(history_, t + i);
    x_.get(s.offset, t - past_ + before, count + past_ - before, tile, x_rows_.data() + before);
    grad_y_.get(p_.cu_seqlens.data ? s.row * b_.grad_y.strides[1] : sequence_ * b_.grad_y.strides[0], t, count, tile,
                grad_y_rows_.data());
    for (int64_t i = 0; i < count; ++i) dpre_rows_[i] = dpre(t + i);
    kernels_.slope[element_of(p_.x.dtype)]({x_rows_.data(), grad_y_rows_.data(), taps_.weight(), taps_.bias(),
                                                   dpre_rows_.data(), sums, count, tile.count, p_.taps.width,
                                                   taps_.stride(), p_.taps.silu});
  }

  // The gradients of inputs next_ .. end, of which those before 0 are the initial state's.
  void write_dx(const Sequence& s, int64_t end, const Tile& tile) {
    const int64_t final = b_.grad_final.data ? length_ - past_ : end;  // from here on grad_final_state is added
    while (next_ < end) {
      int64_t run = next_ < 0 ? std::min<int64_t>(end, 0) : end;
      run = next_ >= final ? next_ + 1 : std::min(run, final);
      const int64_t count = run - next_;
      for (int64_t i = 0; i < count + past_; ++i) window_[i] = dpre(next_ + i);
      const float* added = next_ >= final ? grad_final_.data() + (next_ - final) * width_ : dpre(-1);
      char* to = next_ < 0 ? row(d_initial_, next_ + past_)
                           : static_cast<char*>(b_.dx) + ((s.row + next_) * p_.taps.channels + tile.first) * size_;
      kernels_.fir_from_float[element_of(p_.x.dtype)](
          {window_.data(), taps_.weight() + past_ * taps_.stride(), added, to, count, tile.count, p_.taps.width,
           -taps_.stride(), next_ < 0 ? width_ : p_.taps.channels, false});
      next_ = run;
    }
  }

  void write_d_initial(const Tile& tile) {
    for (int64_t i = 0; i < past_; ++i) window_[i] = row(d_initial_, i);
    Operand to = p_.initial;
    to.data = b_.d_initial;
    to.strides[0] = p_.taps.channels * past_, to.strides[1] = past_, to.strides[2] = 1;
    kernels_.scatter[copy_kernel(p_.x.dtype)](window_.data(), columns_of(to, sequence_, tile, 0, past_));
  }

  const Kernels& kernels_ = kernels();
  const BackwardParams& b_;
  const Params& p_;
  int64_t past_, step_, ring_, width_, size_, sequence_ = 0, length_ = 0, next_ = 0;
  TileTaps taps_;
  TokenRows x_, grad_y_;
  std::vector<char> history_, d_initial_, grad_final_raw_;
  std::vector<float> grad_final_, dpre_, sums_, unused_;
  std::vector<const void*> x_rows_, grad_y_rows_;
  std::vector<float*> dpre_rows_;
  std::vector<const void*> window_;
};

// The sums of all blocks, in their order.
void add_blocks(const BackwardParams& b, const std::vector<float>& partial, int64_t blocks) {
  const Taps& taps = b.forward.taps;
  const int64_t floats = (taps.width + 1) * taps.channels;
  torch::stable::parallel_for(0, floats, 4096, [&](int64_t begin, int64_t end) {
    std::vector<double> sums(end - begin);
    for (int64_t k = 0; k < blocks; ++k) {
      for (int64_t i = begin; i < end; ++i) sums[i - begin] += partial[k * floats + i];
    }
    for (int64_t i = begin; i < end; ++i) {
      const int64_t tap = i / taps.channels, c = i % taps.channels;
      const float sum = float(sums[i - begin]);
      if (tap < taps.width) {
        set_element(b.dweight, taps.weight.dtype, c * taps.width + tap, sum);
      } else if (b.dbias) {
        set_element(b.dbias, taps.bias.dtype, c, sum);
      }
    }
  });
}

void run(const BackwardParams& b) {
  const Params& p = b.forward;
  const std::vector<Sequence> sequences = sequences_of(p);
  clear_padding(p, sequences, p.taps.channels, b.dx);
  const std::vector<Block> blocks = blocks_of(sequences, p.tokens);
  const Tiles tiles(p.taps.channels, kTile);
  const int64_t count = int64_t(blocks.size()), floats = (p.taps.width + 1) * p.taps.channels;
  std::vector<float> partial(count * floats);
  torch::stable::parallel_for(0, count * tiles.count(), 1, [&](int64_t begin, int64_t end) {
    Differentiator differentiator(b, tiles);
    for (int64_t i = begin; i < end; ++i) {
      for (const Piece& piece : blocks[i % count]) {
        differentiator.run(piece, tiles[i / count], partial.data() + i % count * floats);
      }
    }
  });
  add_blocks(b, partial, count);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const OptionalTensor& grad_final_state,
                                                    const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                    const OptionalTensor& initial_state,
                                                    const OptionalTensor& cu_seqlens,
                                                    const std::optional<std::string>& activation) {
  BackwardParams b = check_bwd(grad_y, grad_final_state, x, weight, bias, initial_state, cu_seqlens, activation);
  const auto like = [&](const OptionalTensor& t) {
    return t ? torch::stable::new_empty(*t, t->sizes()) : torch::stable::new_empty(x, {0});
  };
  const Tensor dx = like(x), dweight = like(weight), dbias = like(bias), d_initial = like(initial_state);
  b.dx = dx.mutable_data_ptr(), b.dweight = dweight.mutable_data_ptr();
  b.dbias = bias ? dbias.mutable_data_ptr() : nullptr;
  b.d_initial = initial_state && initial_state->numel() ? d_initial.mutable_data_ptr() : nullptr;
  if (weight.numel()) run(b);
  return {dx, dweight, dbias, d_initial};
}

}  // namespace
}  // namespace n3::causal_conv1d

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) {
  m.impl("causal_conv1d_bwd", TORCH_BOX(&n3::causal_conv1d::backward));
}
