// ssd_scan on sm_90: the warps beside those that compute, one that loads operands and those that make decays from dt.
#pragma once
#include "ssd_scan_sm90_problem.cuh"

namespace n3::ssd_scan::sm90 {

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

}  // namespace n3::ssd_scan::sm90
