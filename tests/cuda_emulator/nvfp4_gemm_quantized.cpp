// What the epilogues of nvfp4_gemm.quantized do with a tile's results, under the emulator, for
// tests/nvfp4/test_gemm_quantize_cuda.py. In place of CUTLASS, which hands threads their elements, y [m, n] is in memory.
#include "cuda_emulator.h"

#include "nvfp4/gemm_quantized_block.cuh"

namespace {

namespace gemm = n3::nvfp4_gemm;

struct Result {
  const float* y;
  uint8_t* q;
  int64_t m, n;
  gemm::Codes codes;

  // What lies outside is a bias, operands being zero there, and is not stored.
  float at(int64_t row, int64_t col) const { return row < m && col < n ? y[row * n + col] : 1.f; }
  void put(int64_t row, int64_t col, uint32_t code) const {
    if (row >= m || col >= n) return;
    uint8_t& byte = q[(row * n + col) / 2];
    byte = col % 2 ? uint8_t((byte & 15) | code << 4) : uint8_t((byte & 0xf0) | code);
  }
};

constexpr int kRows = 128, kCols = 64;  // of a tile

// A thread has a row of the tile.
void rows_kernel(const Result& r, int64_t tiles_n) {
  const gemm::Global g = n3::nvfp4_quantize::global_scale(*r.codes.global, true, false);
  const int64_t row = blockIdx.x / tiles_n * kRows + threadIdx.x, first = blockIdx.x % tiles_n * kCols;
  for (int64_t col = first; col < first + kCols; col += 16) {
    float v[16];
    for (int i = 0; i < 16; ++i) v[i] = gemm::activated(r.at(row, col + i), r.codes.relu2);
    const gemm::Quantised block = gemm::quantised(v, g);
    for (int i = 0; i < 16; ++i) r.put(row, col + i, block.codes.word[i / 8] >> (i % 8 * 4) & 15);
    gemm::store_scale(r.codes, row, col / 16, r.m, r.n / 16, block.scale);
  }
}

// A quad has a row at a time: its threads columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of a block.
void quads_kernel(const Result& r, int64_t tiles_n) {
  const gemm::Global g = n3::nvfp4_quantize::global_scale(*r.codes.global, true, false);
  const int64_t row = blockIdx.x / tiles_n * kRows + threadIdx.x / 4, first = blockIdx.x % tiles_n * kCols;
  const int lane = threadIdx.x % 4;
  for (int64_t block = first; block < first + kCols; block += 16) {
    float v[4];
    for (int i = 0; i < 4; ++i) {
      v[i] = gemm::activated(r.at(row, block + 2 * lane + i % 2 + i / 2 * 8), r.codes.relu2);
    }
    const uint8_t scale = gemm::scaled_by_quad(v, g);
    for (int i = 0; i < 4; ++i) {
      r.put(row, block + 2 * lane + i % 2 + i / 2 * 8, n3::nvfp4_quantize::nearest_code(v[i]));
    }
    if (lane == 0) gemm::store_scale(r.codes, row, block / 16, r.m, r.n / 16, scale);
  }
}

}  // namespace

extern "C" void emulate_codes(bool quads, const float* y, uint8_t* q, int64_t m, int64_t n, uint8_t* scale,
                              const float* global, bool swizzled, bool relu2, bool reversed) {
  const Result r{y, q, m, n, {scale, global, swizzled, relu2}};
  const int64_t tiles_n = (n + kCols - 1) / kCols, tiles = (m + kRows - 1) / kRows * tiles_n;
  if (quads) return emulator::launch(tiles, 4 * kRows, reversed, [&] { quads_kernel(r, tiles_n); });
  emulator::launch(tiles, kRows, reversed, [&] { rows_kernel(r, tiles_n); });
}
