// nvfp4_linear.packed on sm_90a for many tokens: y^T = W x^T by warpgroup products, weights decoded in registers as
// operand a, tokens from shared memory as operand b.
#pragma once
#include "linear_packed_kernel.cuh"

namespace n3::nvfp4_linear_packed {

struct Barriers {
  hopper::Barrier *landed, *empty;
};

// The stage of the n-th step, and the parity of its use.
struct Position {
  int stage = 0;
  uint32_t parity = 0;

  N3_DEVICE void next() {
    if (++stage == kWideStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// By one thread: the tokens, 64 k at a time.
template <typename Shape>
N3_DEVICE void load_stages(char* memory, const Barriers& b, const hopper::TensorMap* map, int32_t token0,
                           int32_t tiles) {
  Position at;
  for (int32_t tile = 0; tile < tiles; ++tile, at.next()) {
    hopper::wait(b.empty + at.stage, at.parity ^ 1);
    hopper::arrive_expecting(b.landed + at.stage, Shape::kStage);
    hopper::load_tile(memory + at.stage * Shape::kStage, map, b.landed + at.stage, tile * blob::kDepth, token0, 0, 0);
  }
}

// d += 16 rows per warp times a stage. Operand a has two sets of registers: step s + 1 is decoded while the products of
// step s run, which only those of step s - 1 must have left.
template <typename T, typename Shape>
N3_DEVICE void multiply_stage(float (&d)[Shape::kProducts][Shape::kWidth / 2], uint32_t (&a)[2][4], const Weights& w,
                              const char* stage, const Global& global, bool first) {
  const auto step = [&](auto constant) {
    constexpr int kStep = decltype(constant)::value;
    uint32_t(&operand)[4] = a[kStep % 2];
    decode<T, kStep>(w.codes, w.scales, global, operand);
    hopper::pin(operand);
    hopper::fence_products();
#pragma unroll
    for (int i = 0; i < Shape::kProducts; ++i) {
      const char* tokens = stage + i * Shape::kWidth * 128 + 32 * kStep;
      hopper::Product<T, Shape::kWidth>::template registers<hopper::Major::kK>(
          d[i], operand, hopper::descriptor<128>(tokens, 8 * 128, 16), kStep > 0 || !first);
    }
    hopper::commit_products();
    hopper::wait_products<1>();
  };
  step(std::integral_constant<int, 0>{});
  step(std::integral_constant<int, 1>{});
  step(std::integral_constant<int, 2>{});
  step(std::integral_constant<int, 3>{});
}

template <typename T, typename Shape>
N3_DEVICE void multiply_all(float (&d)[Shape::kProducts][Shape::kWidth / 2], char* memory, const Barriers& b,
                            const Problem& p, const Global& global, int64_t row_tile, int32_t tiles) {
  const int lane = threadIdx.x % 32;
  const int64_t last = blob::row_tiles(p.n) - 1;
  const uint8_t* weights = p.blob + (row_tile < last ? row_tile : last) * blob::row_bytes(p.k) + 16 * lane;
  const auto load = [&](int32_t tile) {  // behind the last tile, the last again
    return Weights::load(weights + int64_t(tile < tiles ? tile : tiles - 1) * blob::kTile, lane);
  };
  const auto release = [&](int stage) {
    __syncwarp();
    if (lane == 0) hopper::arrive(b.empty + stage);
  };
  Weights ahead[2] = {load(0), load(1)};
  uint32_t a[2][4];
  Position at;
  int before = 0;
  for (int32_t tile = 0; tile < tiles; ++tile, at.next()) {
    const Weights w = ahead[0];
    ahead[0] = ahead[1];
    ahead[1] = load(tile + 2);
    hopper::wait(b.landed + at.stage, at.parity);
    multiply_stage<T, Shape>(d, a, w, memory + at.stage * Shape::kStage, global, tile == 0);
    if (tile > 0) release(before);  // its last products ended with this stage's first
    before = at.stage;
  }
  hopper::wait_products<0>();
#pragma unroll
  for (int i = 0; i < Shape::kProducts; ++i) hopper::pin(d[i]);
}

// The results of a block, from registers through shared memory to rows of y: [token][row of the weights].
template <typename T, typename Shape>
N3_DEVICE void store_tile(const float (&d)[Shape::kProducts][Shape::kWidth / 2], char* memory, const Problem& p,
                          const Global& global, int64_t row0, int64_t token0, int group) {
  const int thread = threadIdx.x, lane = thread % 32;  // of 256
  const int row = 64 * group + thread / 32 % 4 * 16 + lane / 4;
  const T* bias = static_cast<const T*>(p.bias);
  hopper::sync_threads<256>(1);  // nobody reads the stages any more
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t out = row0 + row + 8 * half;
    const bool nan = marked(p, out);
    const float shift = bias && out < p.n ? device::widen(bias[out]) : 0.f;
#pragma unroll
    for (int i = 0; i < Shape::kProducts; ++i) {
#pragma unroll
      for (int j = 0; j < Shape::kWidth / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int token = Shape::kWidth * i + 8 * j + lane % 4 * 2 + e;
          float v = finished(d[i][4 * j + 2 * half + e], nan) * global.rest;
          if (bias) v += shift;
          if (p.relu2) v = relu2(v);
          *reinterpret_cast<T*>(memory + token * Shape::kRowBytes + 2 * (row + 8 * half)) = device::narrow<T>(v);
        }
      }
    }
  }
  hopper::sync_threads<256>(1);
  T* y = static_cast<T*>(p.y);
  const int piece = thread % 16;
  const int64_t out = row0 + 8 * piece;
  for (int token = thread / 16; token < Shape::kTokens && token0 + token < p.m; token += 16) {
    const char* from = memory + token * Shape::kRowBytes + 16 * piece;
    T* to = y + (token0 + token) * p.n + out;
    if (p.n % 8 == 0) {
      if (out < p.n) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int i = 0; i < 8 && out + i < p.n; ++i) to[i] = reinterpret_cast<const T*>(from)[i];
    }
  }
}

//   grid  plan().blocks: tokens outermost, so that the blocks of a wave share tokens in L2     block  kWideThreads: two
//   warpgroups that multiply, 64 rows each, and one of which a thread loads tokens     smem  Shape::kShared, dynamic
// 240 and 24 registers per thread are 504 for three threads, what 168 at the launch give.
template <typename T, typename Shape>
__global__ __launch_bounds__(kWideThreads, 1) void tensor_wide_kernel_sm90(
    const __grid_constant__ hopper::TensorMap map, const __grid_constant__ Problem p) {
  char* memory = hopper::shared_memory();
  auto* barriers = reinterpret_cast<hopper::Barrier*>(memory + Shape::kBarriersAt);
  const Barriers b{barriers, barriers + kWideStages};
  const int64_t row_tile0 = int64_t(blockIdx.x) % p.row_groups * (kWideRows / blob::kRows);
  const int64_t token0 = int64_t(blockIdx.x) / p.row_groups * Shape::kTokens;
  const int32_t tiles = int32_t(blob::depth_tiles(p.k));
  if (threadIdx.x == 0) {
    for (int i = 0; i < kWideStages; ++i) {
      hopper::init_barrier(b.landed + i, 1);
      hopper::init_barrier(b.empty + i, 8);  // a warp each
    }
    hopper::publish_barriers();
    hopper::prefetch_map(&map);
  }
  __syncthreads();
  hopper::let_next_start();
  hopper::wait_for_previous();
  // From one lane, that the compiler sees that a warp agrees: descriptors then live in uniform registers.
  const int group = __shfl_sync(0xffffffffu, int(threadIdx.x) / 128, 0);
  if (group == 2) {
    hopper::give_registers<24>();
    if (threadIdx.x % 128 == 0) load_stages<Shape>(memory, b, &map, int32_t(token0), tiles);
  } else {
    hopper::take_registers<240>();
    const Global global = Global::of<T>(*p.global_scale);
    float d[Shape::kProducts][Shape::kWidth / 2];
    multiply_all<T, Shape>(d, memory, b, p, global, row_tile0 + 4 * group + threadIdx.x / 32 % 4, tiles);
    store_tile<T, Shape>(d, memory, p, global, row_tile0 * blob::kRows, token0, group);
  }
}

}  // namespace n3::nvfp4_linear_packed
