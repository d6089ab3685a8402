// The law of a row as the records give it, and draws from it, by a block of kDrawThreads. Every warp computes the
// scalars by itself, the same numbers; a draw reads one tile again.
#pragma once
#include "rows.cuh"

namespace n3::mtp {

constexpr int kDrawWarps = kDrawThreads / 32;
constexpr int kMostApart = kDrawThreads;   // one for each thread
constexpr int kRun = kTile / kDrawThreads;  // tokens of a thread in an inverse distribution function

struct DrawShared {
  union {
    double weights[kTile + kTile / 32];  // of the tokens of a tile, with a gap after 32 for the banks
    struct {
      float logits[kTile];
      uint16_t rivals[kTile];
    } tile;
  };
  double sums[kDrawWarps];
  int32_t ids[kDrawWarps];
  int32_t count, found;
  int32_t apart;                                   // tokens whose weights are not in the masses
  int32_t token[kMostApart];                       // -1: none
  double p[kMostApart], q[kMostApart], own[kMostApart];  // their weights, q, and what a draw gives them
};

struct Emitted32 {
  int32_t token;
  double logprob;
};

// Where a draw falls: among the tiles, with the mass before.
struct Place {
  int32_t tile;
  double before, wanted;
};

template <typename T>
struct Law {
  const RowArgs& a;
  DrawShared& shared;
  float* stage;  // a sub-tile of this warp's own

  RowView v;
  int32_t unit, slot;
  int64_t row;
  int32_t only;  // the one token, -1: there are several
  uint32_t flags;
  float top, cut;
  double inverse, total;  // 1 / temperature; the sum of all weights, those apart excepted
  Scale2 scale;

  N3_DEVICE Law(const RowArgs& args, DrawShared& s)
      : a(args), shared(s), stage(reinterpret_cast<float*>(hopper::shared_memory()) + warp_id() * int32_t(kSub)) {}

  N3_DEVICE int32_t lowest_allowed() const {
    if (!v.mask) return 0;
    const int32_t count = (a.vocab + 31) / 32;
    for (int32_t start = 0; start < count; start += 32) {
      const uint32_t word = start + lane_id() < count ? mask_word(v, start + lane_id()) : 0;
      const uint32_t hits = __ballot_sync(kAll, word != 0);
      if (!hits) continue;
      const int from = __ffs(hits) - 1;
      return 32 * (start + from) + __ffs(__shfl_sync(kAll, word, from)) - 1;
    }
    return 0;
  }

  N3_DEVICE int32_t best_token() {
    const float* maxima = a.maxima + int64_t(unit) * a.subs;
    int32_t sub = 0;
    for (int32_t start = 0; start < a.subs; start += 32) {
      const int32_t s = start + lane_id();
      const uint32_t hits = __ballot_sync(kAll, s < a.subs && maxima[s] == top);
      if (!hits) continue;
      sub = start + __ffs(hits) - 1;
      break;
    }
    float x[kSubFloats];
    load_sub<T>(a, v, sub, x, stage);
    int32_t first = a.vocab;
#pragma unroll
    for (int j = kSubFloats - 1; j >= 0; --j) {
      if (x[j] == top) first = sub * int32_t(kSub) + place_of(j);
    }
    return min_of_warp(first);
  }

  // Reads what the records say of a row.
  N3_DEVICE void open(const Unit& u, int32_t of_unit) {
    unit = of_unit, slot = u.slot, row = u.row();
    flags = 0, top = 0, cut = -kInf32, inverse = 1, total = 1;
    scale = scale_of(1.f);
    v = view_of<T>(a, row);
    only = forced_token(a, row);
    if (only >= 0) return;
    for (int32_t t = lane_id(); t < a.tiles; t += 32) flags |= a.flags[int64_t(unit) * a.tiles + t];
    flags = any_bits(flags);
    if (flags & kEmptyMask) v.mask = nullptr;
    flags |= range_flags(a, row);
    top = row_top(a, unit);
    if (top == -kInf32) {
      flags |= kNoSupport, only = lowest_allowed();
    } else if (!is_sampled(a, slot) || (top == kInf32 && a.certain_at_infinity)) {
      only = best_token();
    } else {
      const float temperature = temperature_of(a, slot);
      scale = scale_of(temperature), inverse = 1. / temperature;
      if (is_cut(a, slot)) cut = a.cuts[unit];
      total = 0;
      for (int32_t t = lane_id(); t < a.tiles; t += 32) total += tile_mass(t);
      total = sum_of_warp(total);
    }
  }

  // The mass of a tile as in the records, relative to the row's largest logit.
  N3_DEVICE double tile_mass(int32_t tile) const {
    if (only >= 0) return tile == only / int32_t(kTile);
    const float most = tile_top(a, unit, tile);
    return most > -kInf32 ? a.masses[int64_t(unit) * a.tiles + tile] * relative(most, top, inverse) : 0.;
  }

  N3_DEVICE bool keeps(float x) const { return x > -kInf32 && x >= cut; }
  N3_DEVICE double z(float x) const { return x == top ? 0. : (double(x) - double(top)) * inverse; }

  // Of a whole warp; `of_all`: the sum of all weights.
  N3_DEVICE double logprob(int32_t token, double of_all) const {
    if (only >= 0) return token == only ? 0. : -kInf32;
    const float x = load_token<T>(a, v, token);
    return keeps(x) ? z(x) - log(of_all) : -double(kInf32);
  }

  // ---- the draw with Gumbel noise, where nothing is apart

  N3_DEVICE int32_t noisiest_tile(int64_t seed, int64_t pos) const {
    double most = -double(kInf32);
    int32_t best = 0;
    for (int32_t t = lane_id(); t < a.tiles; t += 32) {
      const double mass = a.masses[int64_t(unit) * a.tiles + t];
      const float tops = tile_top(a, unit, t);
      if (!(tops > -kInf32) || !(mass > 0)) continue;
      const double score = log(mass) + z(tops) + gumbel(seed, pos, kTileNoise, t);
      if (score > most) most = score, best = t;
    }
    best_of_warp(most, best);
    return best;
  }

  // The largest score and, of equals, the lowest id.
  N3_DEVICE static void best_of_warp(double& score, int32_t& id) {
#pragma unroll
    for (int by = 16; by; by /= 2) {
      const double other = shuffle_xor(score, by);
      const int32_t its = __shfl_xor_sync(kAll, id, by);
      if (other > score || (other == score && its < id)) score = other, id = its;
    }
  }

  N3_DEVICE void best_of_block(double& score, int32_t& id) {
    best_of_warp(score, id);
    __syncthreads();
    if (lane_id() == 0) shared.sums[warp_id()] = score, shared.ids[warp_id()] = id;
    __syncthreads();
    score = shared.sums[0], id = shared.ids[0];
#pragma unroll
    for (int w = 1; w < kDrawWarps; ++w) {
      const double other = shared.sums[w];
      if (other > score || (other == score && shared.ids[w] < id)) score = other, id = shared.ids[w];
    }
  }

  // Lists the places of the tile's tokens whose weight may beat `limit`: w * limit >= 1 - u. Their logits are kept.
  N3_DEVICE void find_rivals(int64_t seed, int64_t pos, int32_t tile, float most, float limit) {
    __syncthreads();
    if (threadIdx.x == 0) shared.count = 0;
    __syncthreads();
#pragma unroll 1
    for (int s = 0; s < 2; ++s) {
      const int32_t sub = tile * kTileSubs + 2 * warp_id() + s;
      if (sub >= a.subs) break;
      float x[kSubFloats];
      load_sub<T>(a, v, sub, x, stage);
#pragma unroll
      for (int c = 0; c < kSubFloats; c += 4) {
        const int32_t id = sub * int32_t(kSub) + place_of(c), place = id - tile * int32_t(kTile);
        const Philox4 noise = words(seed, pos, kTarget, id);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          shared.tile.logits[place + e] = x[c + e];
          const float rest = float(~noise.word[e]) * 0x1p-32f;
          if (!keeps(x[c + e]) || !(weight(scale, x[c + e], most) * limit >= rest)) continue;
          shared.tile.rivals[atomicAdd(&shared.count, 1)] = uint16_t(place + e);
        }
      }
    }
    __syncthreads();
  }

  // As the operator `sample` emits it: argmax of log-weight and noise, of tiles, then of the tokens of one.
  N3_DEVICE Emitted32 emit(int64_t seed, int64_t pos) {
    if (only >= 0) return {only, 0.};
    const int32_t tile = noisiest_tile(seed, pos);
    const float most = tile_top(a, unit, tile);
    // Exponential variates of rate w: the least wins, and lies below 16 / mass but for one draw in e^16. What may lie
    // below that is found without logarithms, as -log(u) >= 1 - u.
    float limit = float(16 / a.masses[int64_t(unit) * a.tiles + tile]);
    for (;; limit = kInf32) {
      find_rivals(seed, pos, tile, most, limit);
      double score = -double(kInf32);
      int32_t id = a.vocab;
      for (int32_t i = threadIdx.x; i < shared.count; i += kDrawThreads) {
        const int32_t place = shared.tile.rivals[i], token = tile * int32_t(kTile) + place;
        const float x = shared.tile.logits[place];
        const double own = (x == most ? 0. : (double(x) - double(most)) * inverse) + gumbel(seed, pos, kTarget, token);
        if (own > score || (own == score && token < id)) score = own, id = token;
      }
      best_of_block(score, id);
      if (limit == kInf32 || score > 1e-4 - log(double(limit))) {
        return {id, z(shared.tile.logits[id - tile * int32_t(kTile)]) - log(total)};
      }
    }
  }

  // ---- draws by the inverse distribution function

  // factor * mass of each tile's other tokens, and `own` of the support.
  N3_DEVICE double mass_of(int32_t tile, double factor) const {
    double mass = factor * tile_mass(tile);
    for (int32_t e = 0; e < shared.apart; ++e) {
      if (shared.token[e] >= 0 && shared.token[e] / int32_t(kTile) == tile) mass += shared.own[e];
    }
    return mass;
  }

  // The first tile at which the running sum of `mass` passes u times its total; a tile of -1: nothing weighs.
  template <typename Mass>
  N3_DEVICE Place find_tile(double u, Mass mass) const {
    double sum = 0, wanted = 0;
    int32_t last = -1;
    double before_last = 0;
#pragma unroll 1
    for (int pass = 0; pass < 2; ++pass) {
      if (pass) wanted = u * sum;
      sum = 0;
#pragma unroll 1
      for (int32_t start = 0; start < a.tiles; start += 32) {
        const int32_t t = start + lane_id();
        const double own = t < a.tiles ? mass(t) : 0., through = sum + sum_through(own);
        const uint32_t weighs = __ballot_sync(kAll, own > 0);
        const uint32_t hits = pass ? __ballot_sync(kAll, own > 0 && through > wanted) : 0;
        const int chosen = hits ? __ffs(hits) - 1 : weighs ? 31 - __clz(int(weighs)) : 0;
        const double before = chosen ? shuffle(through, chosen - 1) : sum;
        if (hits) return {start + chosen, before, wanted};
        if (weighs) last = start + chosen, before_last = before;
        sum = shuffle(through, 31);
      }
    }
    return {last, before_last, wanted};  // rounding left none
  }

  N3_DEVICE static int32_t slot_of(int32_t place) { return place + place / 32; }

  // Puts weight_of(token, weight) of the tile's tokens to shared memory; where a token is certain, its weight is 1.
  template <typename F>
  N3_DEVICE void fill_weights(int32_t tile, F weight_of) {
    const float most = only >= 0 ? 0.f : tile_top(a, unit, tile);
    const double up = only >= 0 ? 1. : relative(most, top, inverse);
    __syncthreads();
#pragma unroll 1
    for (int s = 0; s < 2; ++s) {
      const int32_t sub = tile * kTileSubs + 2 * warp_id() + s;
      float x[kSubFloats];
      if (only < 0) load_sub<T>(a, v, sub, x, stage);
#pragma unroll
      for (int j = 0; j < kSubFloats; ++j) {
        const int32_t id = sub * int32_t(kSub) + place_of(j);
        const double w = only >= 0 ? id == only : keeps(x[j]) ? weight(scale, x[j], most) * up : 0.;
        shared.weights[slot_of(id - tile * int32_t(kTile))] = id < a.vocab ? weight_of(id, w) : 0.;
      }
    }
    __syncthreads();
  }

  // The token of the tile in shared memory at which the running sum passes what is wanted.
  N3_DEVICE int32_t pick(const Place& at) {
    const int32_t first = int32_t(threadIdx.x) * kRun;
    __syncthreads();  // the sums were read
    double mine = 0;
    for (int i = 0; i < kRun; ++i) mine += fmax(shared.weights[slot_of(first + i)], 0.);
    const double through = sum_through(mine);
    if (lane_id() == 31) shared.sums[warp_id()] = through;
    if (threadIdx.x == 0) shared.found = -1;
    __syncthreads();
    double before = at.before;
    for (int w = 0; w < warp_id(); ++w) before += shared.sums[w];
    const double end = before + through;
    before = end - mine;
    const bool weighs = mine > 0, hit = weighs && end > at.wanted;
    // the first thread that passes, else the last that weighs
    const uint32_t hits = __ballot_sync(kAll, hit), all = __ballot_sync(kAll, weighs);
    __syncthreads();  // the sums were read
    if (lane_id() == 0) {
      shared.ids[warp_id()] = hits ? __ffs(hits) - 1 : -1;
      shared.sums[warp_id()] = all ? 31 - __clz(int(all)) : -1;
    }
    __syncthreads();
    int32_t chosen = -1;
    for (int w = 0; w < kDrawWarps && chosen < 0; ++w) {
      if (shared.ids[w] >= 0) chosen = 32 * w + shared.ids[w];
    }
    for (int w = kDrawWarps - 1; w >= 0 && chosen < 0; --w) {
      if (shared.sums[w] >= 0) chosen = 32 * w + int32_t(shared.sums[w]);
    }
    if (int32_t(threadIdx.x) == chosen) {
      for (int i = 0; i < kRun; ++i) {
        const double w = shared.weights[slot_of(first + i)];
        if (!(w > 0)) continue;
        before += w, shared.found = first + i;
        if (before > at.wanted) break;
      }
    }
    __syncthreads();
    return at.tile * int32_t(kTile) + shared.found;
  }

  // A token by weights: factor * weight, of the support `own` in shared memory. -1: nothing weighs.
  N3_DEVICE int32_t draw(double u, double factor) {
    const Place at = find_tile(u, [&](int32_t t) { return mass_of(t, factor); });
    if (at.tile < 0) return -1;
    fill_weights(at.tile, [&](int32_t, double w) { return factor * w; });
    for (int32_t e = threadIdx.x; e < shared.apart; e += kDrawThreads) {
      const int32_t place = shared.token[e] - at.tile * int32_t(kTile);
      if (shared.token[e] >= 0 && place >= 0 && place < int32_t(kTile)) shared.weights[slot_of(place)] = shared.own[e];
    }
    __syncthreads();
    return pick(at);
  }
};

}  // namespace n3::mtp
