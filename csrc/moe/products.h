// Products of rows with the weights of their groups (an expert is a group): y[i] = W[g] x[i] for positions i that are
// sorted by group. The product is dense or NVFP4, here or in AMX tiles (tile_products.h). Each sums in an order that
// depends on the length of a row alone, so an output's bits depend neither on the other rows of its group nor on the
// threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "../common/buffer.h"
#include "../common/element.h"
#include "../common/threads.h"
#include "../nvfp4/linear_engine.h"
#include "dense_kernels.h"

namespace n3::moe {

constexpr int64_t kGroupSlots = 1024;  // positions whose inputs and results are kept at a time, about
constexpr int64_t kCopyWork = 8;       // multiply-adds in the time of converting or adding one float

// Positions begin .. begin + size of one group.
struct Batch {
  int64_t group, begin, size;
};

inline int64_t positions_of(std::span<const Batch> batches) {
  return batches.back().begin + batches.back().size - batches.front().begin;
}

// Appends `size` positions of a group in nearly equal batches of at most `most`.
inline void add_batches(int64_t group, int64_t begin, int64_t size, int64_t most, std::vector<Batch>& batches) {
  const int64_t parts = (size + most - 1) / most;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t at = size * i / parts;
    batches.push_back({group, begin + at, size * (i + 1) / parts - at});
  }
}

// Calls body(batches) for runs of batches with about kGroupSlots positions in all.
template <typename Body>
void for_runs(std::span<const Batch> batches, const Body& body) {
  for (size_t begin = 0, end = 0; begin < batches.size(); begin = end) {
    for (int64_t n = 0; end < batches.size() && n < kGroupSlots; ++end) n += batches[end].size;
    body(batches.subspan(begin, end - begin));
  }
}

// Rows of inputs: of an element type, or floats followed by zeros to a multiple of dense_linear::kChains.
struct Rows {
  Element element;
  bool padded;
};

// The weights of one side: dense [groups, n, k], or NVFP4 codes [groups, n, k / 2] with their scales.
struct Weights {
  const void* w;
  const uint8_t* block_scale;  // [groups, n, k / 16]; null: dense
  const float* global_scale;   // [groups]
  Element element;             // of dense weights
  int64_t n, k;
};

inline const float* float_row(const void* row) { return static_cast<const float*>(row); }

// ---- dense

class DenseProduct {
 public:
  static constexpr int64_t kMostTokens = 96;        // of a batch
  static constexpr int64_t kPanelBytes = 96 << 10;  // of weights: an item, in a level-2 cache
  static constexpr int64_t kMostRows = 256;         // of an item

  // A row of floats for each position.
  struct Inputs {
    int64_t first;
    std::vector<const float*> rows;
    Buffer<float> floats;
  };

  explicit DenseProduct(const Weights& weights) : weights_(weights), kernels_(dense_linear::kernels()) {}

  int64_t n() const { return weights_.n; }
  int64_t k() const { return weights_.k; }

  int64_t panel_rows(int64_t) const {
    const int64_t row_bytes = std::max<int64_t>(k(), 1) * element_size(weights_.element), tile = dense_linear::kRowTile;
    return std::clamp(kPanelBytes / row_bytes / tile * tile, tile, kMostRows);
  }
  int64_t row_stride(int64_t rows) const { return dense_linear::whole(rows, dense_linear::kRowTile); }
  int64_t scratch_bytes(int64_t tokens) const { return kernels_.scratch_floats(k(), tokens) * 4; }

  // row_of(position): its input.
  template <typename RowOf>
  Inputs inputs(std::span<const Batch> batches, const Rows& kind, const RowOf& row_of) const {
    const int64_t count = positions_of(batches), first = batches[0].begin;
    const int64_t ld = dense_linear::whole(k(), dense_linear::kChains);
    Inputs in{first, std::vector<const float*>(count), {}};
    if (kind.padded || (kind.element == kFloat && k() == ld)) {
      for (int64_t i = 0; i < count; ++i) in.rows[i] = float_row(row_of(first + i));
      return in;
    }
    in.floats = buffer<float>(count * ld * 4);
    for_items(count, count * ld * kCopyWork, [&](const auto& take) {
      for (int64_t i = take(); i < count; i = take()) {
        float* row = in.floats.get() + i * ld;
        kernels_.widen[kind.element](row_of(first + i), k(), row);
        in.rows[i] = row;
      }
    });
    return in;
  }

  // out[t * row_stride(rows) + r] of weight rows row .. row + rows of the batch's group.
  void sums(const Batch& batch, int64_t row, int64_t rows, const Inputs& in, void* scratch, float* out) const {
    const int64_t offset = (batch.group * n() + row) * k() * element_size(weights_.element);
    const dense_linear::Panel panel{static_cast<const char*>(weights_.w) + offset, rows, k()};
    const float* const* x = in.rows.data() + (batch.begin - in.first);
    kernels_.sums[weights_.element](panel, x, batch.size, static_cast<float*>(scratch), out);
  }

 private:
  Weights weights_;
  const dense_linear::Kernels& kernels_;
};

// ---- NVFP4

class Nvfp4Product {
 public:
  static constexpr int64_t kMostTokens = nvfp4_linear::kTokens;

  // The rows of each batch, packed as the kernel wants them.
  struct Inputs {
    int64_t first;
    Buffer<float> packed;
  };

  explicit Nvfp4Product(const Weights& weights) : weights_(weights), kernels_(nvfp4_linear::kernels()) {}

  int64_t n() const { return weights_.n; }
  int64_t k() const { return weights_.k; }

  int64_t panel_rows(int64_t tokens) const { return kernels_.panel_rows(k(), tokens); }
  int64_t row_stride(int64_t rows) const { return rows; }
  int64_t scratch_bytes(int64_t tokens) const { return kernels_.scratch_bytes(k(), tokens); }

  template <typename RowOf>
  Inputs inputs(std::span<const Batch> batches, const Rows& kind, const RowOf& row_of) const {
    struct Tile {
      int64_t begin, size;
    };
    std::vector<Tile> tiles;
    for (const Batch& batch : batches) {
      const nvfp4_linear::Tiles split{batch.size};
      for (int64_t i = 0; i < split.count(); ++i) {
        tiles.push_back({batch.begin + split.begin(i), split.begin(i + 1) - split.begin(i)});
      }
    }
    const int64_t floats = row_floats(), positions = positions_of(batches), count = int64_t(tiles.size());
    Inputs in{batches[0].begin, buffer<float>(positions * floats * 4)};
    const auto widen = dense_linear::kernels().widen[kind.element];
    for_items(count, positions * floats * kCopyWork, [&](const auto& take) {
      const auto row = buffer<float>(floats * 4);
      for (int64_t i = take(); i < count; i = take()) {
        float* tile = in.packed.get() + (tiles[i].begin - in.first) * floats;
        for (int64_t t = 0; t < tiles[i].size; ++t) {
          const void* from = row_of(tiles[i].begin + t);
          if (kind.element != kFloat) widen(from, k(), row.get());
          const float* x = kind.element == kFloat ? float_row(from) : row.get();
          kernels_.pack(x, k(), tiles[i].size, t, tile);
        }
      }
    });
    return in;
  }

  void sums(const Batch& batch, int64_t row, int64_t rows, const Inputs& in, void* scratch, float* out) const {
    const nvfp4_linear::GlobalScale global =
        nvfp4_linear::split_global_scale(kernels_.decoding, weights_.global_scale[batch.group]);
    const int64_t at = batch.group * n() + row;
    const nvfp4_linear::Panel panel{static_cast<const uint8_t*>(weights_.w) + at * (k() / 2),
                                    weights_.block_scale + at * (k() / 16), rows, k()};
    kernels_.sums(global.table, panel, in.packed.get() + (batch.begin - in.first) * row_floats(), batch.size, scratch,
                  out);
    for (int64_t i = 0; i < batch.size * rows; ++i) out[i] *= global.factor;
  }

 private:
  int64_t row_floats() const { return nvfp4_linear::packed_floats(k()); }

  Weights weights_;
  const nvfp4_linear::Kernels& kernels_;
};

// ---- either

// Calls write(position, r, h, value, count) for pieces of every position's outputs: h[i] is output r + i, and where the
// outputs have two halves, the gate and the value, value[i] is output n / 2 + r + i (else it is null). h is write's to
// change. One item is a panel of weight rows, so an output has one owner.
template <typename Product, typename Write>
void multiply(const Product& product, bool gated, std::span<const Batch> batches, const typename Product::Inputs& in,
              const Write& write) {
  struct Item {
    const Batch* batch;
    int64_t row, rows;
  };
  std::vector<Item> items;
  const int64_t n = gated ? product.n() / 2 : product.n();
  int64_t scratch_bytes = 0, sum_floats = 0;
  for (const Batch& batch : batches) {
    const int64_t rows = product.panel_rows(batch.size);
    for (int64_t r = 0; r < n; r += rows) items.push_back({&batch, r, std::min(rows, n - r)});
    scratch_bytes = std::max(scratch_bytes, product.scratch_bytes(batch.size));
    sum_floats = std::max(sum_floats, product.row_stride(rows) * batch.size);
  }
  const int64_t count = int64_t(items.size());
  for_items(count, positions_of(batches) * product.n() * product.k(), [&](const auto& take) {
    const auto scratch = buffer<char>(scratch_bytes);
    const auto h = buffer<float>(sum_floats * 4), value = buffer<float>(gated ? sum_floats * 4 : 0);
    for (int64_t i = take(); i < count; i = take()) {
      const auto [batch, row, rows] = items[i];
      product.sums(*batch, row, rows, in, scratch.get(), h.get());
      if (gated) product.sums(*batch, n + row, rows, in, scratch.get(), value.get());
      const int64_t stride = product.row_stride(rows);
      for (int64_t t = 0; t < batch->size; ++t) {
        const float* second = gated ? value.get() + t * stride : nullptr;
        write(batch->begin + t, row, h.get() + t * stride, second, rows);
      }
    }
  });
}

}  // namespace n3::moe
