// What the convolution's CPU files share, and the fused mixer may use: tiles of channels, their taps as floats, the
// rows of a matrix and the columns of a state. Channels do not see each other, so a tile is a problem of its own.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "../common/element.h"
#include "conv1d.h"
#include "conv1d_kernels.h"

namespace n3::causal_conv1d {

// Channels first .. first + count.
struct Tile {
  int64_t first, count;
};

// Channels in tiles of about the same size, multiples of 16 of them but for the last.
class Tiles {
 public:
  Tiles(int64_t channels, int64_t most) : channels_(channels) {
    const int64_t tiles = std::max<int64_t>(1, (channels + most - 1) / most);
    width_ = ((channels + tiles - 1) / tiles + 15) / 16 * 16;
  }
  int64_t count() const { return width_ ? (channels_ + width_ - 1) / width_ : 0; }
  int64_t width() const { return width_; }  // of the widest
  Tile operator[](int64_t i) const { return {i * width_, std::min(width_, channels_ - i * width_)}; }

 private:
  int64_t channels_, width_;
};

inline int copy_kernel(ScalarType dtype) { return dtype == ScalarType::Float ? 0 : 1; }  // gather and scatter

inline char* element_at(const Operand& o, int64_t offset) {
  return static_cast<char*>(o.data) + offset * element_size(o.dtype);
}

// Inputs first .. first + count of a tile in a slot of a state [slots, C, S].
inline Columns columns_of(const Operand& state, int64_t slot, const Tile& tile, int64_t first, int64_t count) {
  const int64_t* stride = state.strides;
  return {element_at(state, slot * stride[0] + tile.first * stride[1] + first * stride[2]), tile.count, count,
          stride[1], stride[2]};
}

// The taps of a tile as floats: row k is tap k, one more row is the bias.
class TileTaps {
 public:
  TileTaps(const Kernels& kernels, const Taps& taps, int64_t width)
      : kernels_(kernels), taps_(taps), stride_(width), floats_((taps.width + 1) * width),
        raw_(taps.width * width * sizeof(float)) {}

  void load(const Tile& tile) {
    if (tile.first == loaded_) return;
    loaded_ = tile.first;
    const int64_t* stride = taps_.weight.strides;
    convert(taps_.weight, {element_at(taps_.weight, tile.first * stride[0]), tile.count, taps_.width, stride[0],
                           stride[1]}, floats_.data());
    if (!taps_.bias.data) return;  // zeros
    const int64_t step = taps_.bias.strides[0];
    convert(taps_.bias, {element_at(taps_.bias, tile.first * step), tile.count, 1, step, 1},
            floats_.data() + taps_.width * stride_);
  }

  const float* weight() const { return floats_.data(); }
  const float* bias() const { return floats_.data() + taps_.width * stride_; }
  int64_t stride() const { return stride_; }

 private:
  void convert(const Operand& o, const Columns& from, float* to) {
    const int64_t size = element_size(o.dtype);
    kernels_.gather[copy_kernel(o.dtype)](from, raw_.data(), stride_);
    for (int64_t i = 0; i < from.inputs; ++i) {
      kernels_.to_float[element_of(o.dtype)](raw_.data() + i * stride_ * size, to + i * stride_, from.channels);
    }
  }

  const Kernels& kernels_;
  const Taps& taps_;
  int64_t stride_, loaded_ = -1;
  std::vector<float> floats_;
  std::vector<char> raw_;
};

// Pointers to the rows of tokens: into the matrix where its channels lie side by side, else to copies.
class TokenRows {
 public:
  TokenRows(const Kernels& kernels, const Operand& x, int64_t most, int64_t width)
      : kernels_(kernels), x_(x), width_(width), size_(element_size(x.dtype)),
        copies_(x.strides[2] == 1 ? 0 : most * width * size_) {}

  // `offset`: of the sequence's first token, in elements.
  void get(int64_t offset, int64_t token, int64_t count, const Tile& tile, const void** rows) {
    if (count <= 0) return;
    const int64_t* stride = x_.strides;
    char* data = element_at(x_, offset + token * stride[1] + tile.first * stride[2]);
    if (stride[2] == 1) {
      for (int64_t i = 0; i < count; ++i) rows[i] = data + i * stride[1] * size_;
      return;
    }
    kernels_.gather[copy_kernel(x_.dtype)]({data, tile.count, count, stride[2], stride[1]}, copies_.data(), width_);
    for (int64_t i = 0; i < count; ++i) rows[i] = copies_.data() + i * width_ * size_;
  }

 private:
  const Kernels& kernels_;
  const Operand& x_;
  int64_t width_, size_;
  std::vector<char> copies_;
};

// causal_conv1d_update on values that were checked; for the mixer with y in float32 whatever x is.
void run_update(const UpdateParams& p, bool float_y);

// The state after a token of a prompt, kept in a slot besides the final one. tokens: those of the sequence before it.
struct Checkpoint {
  int64_t tokens, slot;
};

// What the values of the indices say of one sequence, checked before anything is written.
struct Sequence {
  int64_t length;
  int64_t row;     // of its first token in y
  int64_t offset;  // of its first token in x, in elements
  int64_t slot;    // negative: padding
  bool initial;    // continues from its slot of `initial`
  std::vector<Checkpoint> checkpoints;
};

// Checks the values of the indices and gives each sequence its checkpoints.
std::vector<Sequence> sequences_of(const Params& p);

// Zeros in rows [sequences' end, tokens) of a contiguous [tokens, channels] of the dtype of x, and in those of padding
// sequences.
void clear_padding(const Params& p, const std::vector<Sequence>& sequences, int64_t channels, void* y);

// Writes the final states and the checkpoints of the sequences.
void keep_states(const Params& p, const std::vector<Sequence>& sequences);

}  // namespace n3::causal_conv1d
