// The products of products.h in AMX tiles, with dense weights and with NVFP4: for rows of bfloat16, on CPUs that have
// them. What lies between the two products of the experts goes from accumulators to packed tiles in two parts, so that
// 16 bits of it or more are kept.
#pragma once
#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "dense_amx.h"
#include "products.h"

namespace n3::moe {

constexpr int64_t kMostTileTokens = 192;  // of a batch: their packed rows stay in a level-2 cache

// The rows of each batch as tiles of tokens.
struct TileInputs {
  int64_t first, parts;
  std::vector<int64_t> at;  // bytes before a batch's tiles, at the place of its first position
  Buffer<char> packed;

  char* tiles(const Batch& batch) const { return packed.get() + at[batch.begin - first]; }
  amx::Packed of(const Batch& batch) const { return {tiles(batch), batch.size, parts}; }
};

inline TileInputs tile_buffer(std::span<const Batch> batches, int64_t k, int64_t parts) {
  TileInputs in{batches[0].begin, parts, std::vector<int64_t>(positions_of(batches)), {}};
  int64_t bytes = 0;
  for (const Batch& batch : batches) {
    in.at[batch.begin - in.first] = bytes;
    bytes += amx::tiles_of(batch.size) * parts * amx::tile_bytes(k, batch.size);
  }
  in.packed = buffer<char>(bytes);
  return in;
}

// row_of(position): its input, of bfloat16.
template <typename RowOf>
TileInputs pack_tiles(std::span<const Batch> batches, int64_t k, amx::Pack pack, const RowOf& row_of) {
  struct Tile {
    const Batch* batch;
    int64_t i;
  };
  std::vector<Tile> all;
  for (const Batch& batch : batches) {
    for (int64_t i = 0; i < amx::tiles_of(batch.size); ++i) all.push_back({&batch, i});
  }
  TileInputs in = tile_buffer(batches, k, 1);
  const int64_t count = int64_t(all.size());
  for_items(count, positions_of(batches) * k * kCopyWork, [&](const auto& take) {
    for (int64_t item = take(); item < count; item = take()) {
      const auto [batch, i] = all[item];
      const int64_t t0 = i * amx::kTileTokens, size = std::min(amx::kTileTokens, batch->size - t0);
      const void* rows[amx::kTileTokens];
      for (int64_t t = 0; t < size; ++t) rows[t] = row_of(batch->begin + t0 + t);
      pack(rows, size, k, amx::tile_width(batch->size), in.tiles(*batch) + i * amx::tile_bytes(k, batch->size));
    }
  });
  return in;
}

class DenseTileProduct {
 public:
  static constexpr auto kPairs = dense_linear::amx::Pairs::kInOrder;

  explicit DenseTileProduct(const Weights& weights) : weights_(weights), kernels_(*dense_linear::tile_kernels()) {}

  int64_t n() const { return weights_.n; }
  int64_t k() const { return weights_.k; }
  amx::Pack pack() const { return kernels_.pack; }

  int64_t panel_rows() const {
    const int64_t row_bytes = std::max<int64_t>(k(), 1) * 2, tile = amx::kPanelRows;
    return std::clamp(DenseProduct::kPanelBytes / row_bytes / tile * tile, tile, DenseProduct::kMostRows);
  }
  int64_t work_bytes(int64_t) const { return 0; }

  // Accumulators of up to panel_rows() weight rows; returns their factor.
  float accumulate(const Batch& batch, int64_t row, int64_t rows, const amx::Packed& x, char*, char* acc) const {
    const int64_t offset = (batch.group * n() + row) * k() * 2;
    kernels_.accumulate({static_cast<const char*>(weights_.w) + offset, rows, k()}, x, acc);
    return 1.f;
  }

 private:
  Weights weights_;
  const dense_linear::amx::Kernels& kernels_;
};

class Nvfp4TileProduct {
 public:
  static constexpr auto kPairs = dense_linear::amx::Pairs::kNvfp4;

  explicit Nvfp4TileProduct(const Weights& weights) : weights_(weights), kernels_(*nvfp4_linear::tile_kernels()) {}

  int64_t n() const { return weights_.n; }
  int64_t k() const { return weights_.k; }
  amx::Pack pack() const { return kernels_.pack; }

  int64_t panel_rows() const { return amx::kPanelRows; }
  int64_t work_bytes(int64_t tokens) const { return kernels_.scratch_bytes(k(), tokens); }

  float accumulate(const Batch& batch, int64_t row, int64_t rows, const amx::Packed& x, char* work, char* acc) const {
    const nvfp4_linear::GlobalScale global =
        nvfp4_linear::split_global_scale(kernels_.decoding, weights_.global_scale[batch.group]);
    const int64_t at = batch.group * n() + row;
    const nvfp4_linear::Panel panel{static_cast<const uint8_t*>(weights_.w) + at * (k() / 2),
                                    weights_.block_scale + at * (k() / 16), rows, k()};
    kernels_.accumulate(global.table, panel, x, work, acc);
    return global.factor;
  }

 private:
  Weights weights_;
  const nvfp4_linear::amx::Kernels& kernels_;
};

// Bytes of a panel's accumulators.
template <typename Product>
int64_t acc_bytes(const Product& product, int64_t tokens) {
  return (product.panel_rows() + amx::kPanelRows - 1) / amx::kPanelRows * amx::acc_bytes(tokens);
}

// A panel's accumulators to row_of(t) + row of every token.
template <typename RowOf>
void store_rows(int64_t tokens, int64_t row, int64_t rows, float factor, const char* acc, const RowOf& row_of) {
  float* to[kMostTileTokens];
  for (int64_t t = 0; t < tokens; ++t) to[t] = row_of(t) + row;
  for (int64_t r = 0; r < rows; r += amx::kPanelRows, acc += amx::acc_bytes(tokens)) {
    dense_linear::tile_kernels()->to_rows(acc, factor, std::min(amx::kPanelRows, rows - r), tokens, to);
    for (int64_t t = 0; t < tokens; ++t) to[t] += amx::kPanelRows;
  }
}

// A tile product as multiply() wants it.
template <typename Product>
class InTiles {
 public:
  static constexpr int64_t kMostTokens = kMostTileTokens;
  using Inputs = TileInputs;

  explicit InTiles(const Weights& weights) : product_(weights) {}

  int64_t n() const { return product_.n(); }
  int64_t k() const { return product_.k(); }
  const Product& tiles() const { return product_; }

  int64_t panel_rows(int64_t) const { return product_.panel_rows(); }
  int64_t row_stride(int64_t rows) const { return rows; }
  int64_t scratch_bytes(int64_t tokens) const { return acc_bytes(product_, tokens) + product_.work_bytes(tokens); }

  template <typename RowOf>
  Inputs inputs(std::span<const Batch> batches, const Rows&, const RowOf& row_of) const {
    return pack_tiles(batches, k(), product_.pack(), row_of);
  }

  void sums(const Batch& batch, int64_t row, int64_t rows, const Inputs& in, void* scratch, float* out) const {
    char *acc = static_cast<char*>(scratch), *work = acc + acc_bytes(product_, batch.size);
    const float factor = product_.accumulate(batch, row, rows, in.of(batch), work, acc);
    store_rows(batch.size, row, rows, factor, acc, [&](int64_t t) { return out + t * rows - row; });
  }

 private:
  Product product_;
};

// ---- the experts' two products

// Calls body(batch, row, rows, work, acc, value) for panels of the first `n` rows; the last three are memory.
template <typename Product, typename Body>
void for_panels(const Product& product, int64_t n, std::span<const Batch> batches, const Body& body) {
  struct Item {
    const Batch* batch;
    int64_t row;
  };
  std::vector<Item> items;
  int64_t work_bytes = 0, most = 0;
  for (const Batch& batch : batches) {
    for (int64_t r = 0; r < n; r += product.panel_rows()) items.push_back({&batch, r});
    work_bytes = std::max(work_bytes, product.work_bytes(batch.size));
    most = std::max(most, acc_bytes(product, batch.size));
  }
  const int64_t count = int64_t(items.size());
  for_items(count, positions_of(batches) * product.n() * product.k(), [&](const auto& take) {
    const auto work = buffer<char>(work_bytes), acc = buffer<char>(2 * most);
    for (int64_t i = take(); i < count; i = take()) {
      const auto [batch, row] = items[i];
      body(*batch, row, std::min(product.panel_rows(), n - row), work.get(), acc.get(), acc.get() + most);
    }
  });
}

// act(W x) as tiles for the next product; 32 rows are a step of it.
template <typename Product>
TileInputs activated(const Product& product, dense_linear::Activation activation, int64_t inner,
                     std::span<const Batch> batches, const TileInputs& in) {
  static_assert(amx::kPanelRows == amx::kStep);
  TileInputs out = tile_buffer(batches, inner, 2);
  const bool gated = inner < product.n();
  for_panels(product, inner, batches,
             [&](const Batch& batch, int64_t row, int64_t rows, char* work, char* acc, char* value) {
               const float factor = product.accumulate(batch, row, rows, in.of(batch), work, acc);
               if (gated) product.accumulate(batch, inner + row, rows, in.of(batch), work, value);
               for (int64_t r = 0; r < rows; r += amx::kPanelRows) {
                 const int64_t at = r / amx::kPanelRows * amx::acc_bytes(batch.size);
                 dense_linear::tile_kernels()->pack_activated(
                     {activation, acc + at, value + at, factor, std::min(amx::kPanelRows, rows - r), batch.size,
                      (row + r) / amx::kStep, inner, Product::kPairs, out.tiles(batch)});
               }
             });
  return out;
}

// W x to row_of(position).
template <typename Product, typename RowOf>
void rows_of(const Product& product, std::span<const Batch> batches, const TileInputs& in, const RowOf& row_of) {
  for_panels(product, product.n(), batches,
             [&](const Batch& batch, int64_t row, int64_t rows, char* work, char* acc, char*) {
               const float factor = product.accumulate(batch, row, rows, in.of(batch), work, acc);
               store_rows(batch.size, row, rows, factor, acc, [&](int64_t t) { return row_of(batch.begin + t); });
             });
}

// Calls run(product's type) for weights of this kind and rows of this type; the type is that of a null pointer.
template <typename Run>
void with_product(bool dense, Element element, const Run& run) {
  const bool tiles = element == kBFloat16 && dense_linear::tile_kernels();
  if (dense) {
    tiles ? run(static_cast<InTiles<DenseTileProduct>*>(nullptr)) : run(static_cast<DenseProduct*>(nullptr));
  } else {
    tiles ? run(static_cast<InTiles<Nvfp4TileProduct>*>(nullptr)) : run(static_cast<Nvfp4Product*>(nullptr));
  }
}

}  // namespace n3::moe
