// moe_route and moe_route_bwd, formulas in route.h: one warp for each token, expert e in lane e % 32, slot j in lane j.
//
// Scores are float64 rounded once, as on every backend; an expert's key is its choice as an unsigned integer of the
// same order, and the k largest are taken one by one, of equal ones the lowest expert.
#pragma once
#include "../common/device.cuh"
#include "route_plan.h"

namespace n3::moe_route {

struct Args {
  const void* logits;
  int64_t strides[2];
  const float* bias;          // [experts]; null: none
  const int32_t* expert_map;  // [experts]; null: none
  int32_t* ids;
  float* weights;
  int32_t* counts;  // zeroed before
  int32_t* flags;
  int64_t tokens;
  int32_t experts, top_k, n_group, topk_group;
  bool softmax, normalize;
  float scale;
};

struct BackwardArgs {
  const float* grad;
  int64_t grad_strides[2];
  const void* logits;
  int64_t strides[2];
  const int32_t* ids;
  void* out;  // [tokens, experts]
  int64_t tokens;
  int32_t experts, top_k;
  bool softmax, normalize;
  float scale;
};

constexpr uint32_t kNever = 0;  // below the key of -inf: taken, or in a group that takes no part

N3_DEVICE uint32_t key_of(float choice) {
  const uint32_t bits = float_bits(choice != choice ? -INFINITY : choice + 0.f);  // -0 with 0
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

N3_DEVICE float value_of(uint32_t key) { return bits_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)); }

N3_DEVICE uint32_t warp_max(uint32_t v) { return __reduce_max_sync(0xffffffffu, v); }

// The largest key and, of the lanes that hold it, the lowest index: the index, and in every lane.
N3_DEVICE uint32_t warp_best(uint32_t key, uint32_t index) {
  const uint32_t top = warp_max(key);
  return ~warp_max(key == top ? ~index : 0u);
}

N3_DEVICE double warp_sum(double v) {
#pragma unroll
  for (int offset = 16; offset; offset /= 2) {
    uint64_t bits;
    memcpy(&bits, &v, sizeof bits);
    const uint32_t low = __shfl_xor_sync(0xffffffffu, uint32_t(bits), offset);
    const uint32_t high = __shfl_xor_sync(0xffffffffu, uint32_t(bits >> 32), offset);
    bits = uint64_t(high) << 32 | low;
    double other;
    memcpy(&other, &bits, sizeof other);
    v += other;
  }
  return v;
}

// What a row's scores need beside the logit: for softmax the row's maximum and sum.
struct Score {
  bool softmax;
  float largest;
  double total;

  N3_DEVICE float operator()(float x) const {
    if (softmax) return float(exp(double(x) - double(largest)) / total);
    return float(1. / (1. + exp(-double(x))));
  }
};

template <typename T>
struct Row {
  const T* data;
  int64_t stride;
  int experts;

  N3_DEVICE float operator[](int e) const { return device::widen(data[e * stride]); }
};

template <typename T>
N3_DEVICE Row<T> row_of(const void* logits, const int64_t (&strides)[2], int64_t token, int experts) {
  return {static_cast<const T*>(logits) + token * strides[0], strides[1], experts};
}

// Loops over the row stay loops: float64's exp is long, and copies of it for each expert of a lane take minutes to
// compile. A row is read from the caches after the first time.
template <typename T>
N3_DEVICE Score score_of(bool softmax, const Row<T>& row) {
  if (!softmax) return {false, 0.f, 0.};
  uint32_t top = 0;
#pragma unroll 1
  for (int e = threadIdx.x % 32; e < row.experts; e += 32) top = max(top, key_of(row[e]));  // without the NaN
  Score s{true, value_of(warp_max(top)), 0.};
  double sum = 0;
#pragma unroll 1
  for (int e = threadIdx.x % 32; e < row.experts; e += 32) sum += exp(double(row[e]) - double(s.largest));
  s.total = warp_sum(sum);
  return s;
}

// Marks the experts of the groups that take no part. `group`: a word per group, of this warp alone.
N3_DEVICE void drop_groups(const Args& a, uint32_t* key, uint32_t* group) {
  const int lane = threadIdx.x % 32, size = a.experts / a.n_group;
  for (int g = lane; g < a.n_group; g += 32) {
    uint32_t best = key[g * size], second = kNever;
    for (int i = 1; i < size; ++i) {
      const uint32_t k = key[g * size + i], low = k < best ? k : best;
      best = max(best, k), second = max(second, low);
    }
    group[g] = key_of(size > 1 ? value_of(best) + value_of(second) : value_of(best));
  }
  for (int taken = 0; taken < a.topk_group; ++taken) {
    uint32_t best = kNever, which = 0;
    for (int g = lane; g < a.n_group; g += 32) {
      if (group[g] > best) best = group[g], which = g;
    }
    which = warp_best(best, which);
    if (which % 32 == uint32_t(lane)) group[which] = kNever;  // which says that it is kept
  }
  __syncwarp();
  for (int e = lane; e < a.experts; e += 32) {
    if (group[e / size] != kNever) key[e] = kNever;
  }
}

//   grid  plan().blocks     block kThreads: as many warps as tokens     smem  256 * kPer bytes per warp
// A lane keeps the keys of its kPer experts in registers while the k largest are taken.
template <typename T, int kPer>
__global__ __launch_bounds__(kThreads) void forward_kernel(const Args a) {
  __shared__ uint32_t keys[kThreads / 32][32 * kPer], groups[kThreads / 32][32 * kPer];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t token = int64_t(blockIdx.x) * (kThreads / 32) + warp;
  if (token >= a.tokens) return;  // a whole warp
  const Row<T> row = row_of<T>(a.logits, a.strides, token, a.experts);
  const Score score = score_of(a.softmax, row);
  bool bad = false;
#pragma unroll 1
  for (int e = lane; e < a.experts; e += 32) {
    const float x = row[e], s = score(x);
    bad |= (float_bits(x) & 0x7f800000u) == 0x7f800000u;
    keys[warp][e] = key_of(a.bias ? s + a.bias[e] : s);
  }
  bad = __ballot_sync(0xffffffffu, bad) != 0;
  if (a.n_group > 1) {
    __syncwarp();
    drop_groups(a, keys[warp], groups[warp]);
    __syncwarp();
  }

  uint32_t key[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) key[i] = lane + 32 * i < a.experts ? keys[warp][lane + 32 * i] : kNever;
  uint32_t mine = 0;  // the expert of slot `lane`
  for (int j = 0; j < a.top_k; ++j) {
    uint32_t best = kNever, which = 0;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (key[i] > best) best = key[i], which = lane + 32 * i;
    }
    const uint32_t chosen = warp_best(best, which);
    if (lane == j) mine = chosen;
#pragma unroll
    for (int i = 0; i < kPer; ++i) key[i] = chosen == uint32_t(lane + 32 * i) ? kNever : key[i];
  }

  float s = 0.f;
  if (lane < a.top_k) {
    s = score(row[mine]);
    s = s != s ? 0.f : s;
  }
  float total = 0.f;
  for (int j = 0; j < a.top_k; ++j) total += __shfl_sync(0xffffffffu, s, j);
  if (lane == 0) a.flags[token] = bad;
  if (lane >= a.top_k) return;
  atomicAdd(a.counts + mine, 1);
  const int64_t slot = token * a.top_k + lane;
  a.weights[slot] = (a.normalize ? s / (total + 1e-20f) : s) * a.scale;
  a.ids[slot] = a.expert_map ? a.expert_map[mine] : int32_t(mine);
}

// Grid and block as above. The row is written as it is for experts that were not chosen, then the chosen ones'
// elements.
template <typename T>
__global__ __launch_bounds__(kThreads) void backward_kernel(const BackwardArgs a) {
  const int lane = threadIdx.x % 32;
  const int64_t token = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (token >= a.tokens) return;
  const Row<T> row = row_of<T>(a.logits, a.strides, token, a.experts);
  const Score score = score_of(a.softmax, row);

  float s = 0.f, g = 0.f;
  int32_t mine = -1;
  if (lane < a.top_k) {
    mine = a.ids[token * a.top_k + lane];
    if (mine >= a.experts) mine = -1;  // values are not checked on the host, which would wait for the device
    g = a.grad[token * a.grad_strides[0] + lane * a.grad_strides[1]] * a.scale;
  }
  if (mine >= 0) {
    s = score(row[mine]);
    s = s != s ? 0.f : s;
  }
  float total = 0.f, dot = 0.f;
  for (int j = 0; j < a.top_k; ++j) {
    total += __shfl_sync(0xffffffffu, s, j);
    dot += __shfl_sync(0xffffffffu, g * s, j);
  }
  if (a.normalize) {
    total += 1e-20f;
    g = (g - dot / total) / total;
  }
  float all = 0.f;
  if (a.softmax) {
    for (int j = 0; j < a.top_k; ++j) all += __shfl_sync(0xffffffffu, g * s, j);
  }

  T* out = static_cast<T*>(a.out) + token * a.experts;
#pragma unroll 1
  for (int e = lane; e < a.experts; e += 32) {
    float other = 0.f;
    if (a.softmax) {
      other = score(row[e]);
      other = (other != other ? 0.f : other) * (0.f - all);
    }
    out[e] = device::narrow<T>(other);
  }
  __syncwarp();  // before other lanes write over it
  if (mine >= 0) out[mine] = device::narrow<T>(a.softmax ? s * (g - all) : g * s * (1.f - s));
}

}  // namespace n3::moe_route
