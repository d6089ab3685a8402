// One request of mtp_commit. Host and device, no torch; rules in n3kernels/mtp/commit.py.
#pragma once
#include "../common/numerics.h"

namespace n3::mtp_commit {

struct Args {
  const int32_t *tokens, *num_emitted, *cu_rows;                              // [B, width], [B], [B + 1]
  const int32_t *slot, *eos_ids, *max_len;                                    // [B], [eos], [slots], or null
  int32_t *seq_len, *finished, *ring_pos;                                     // in place, of any strides; or null
  int64_t* histogram;
  int32_t *num_accepted, *last_token, *last_row, *kv_start, *kv_free, *flat;  // outputs
  int32_t* cu_emitted;
  int64_t seq_stride, finished_stride, ring_strides[2], histogram_stride;
  int64_t requests, width, slots, eos, bins, ring_size, ring_tokens;
};

N3_HD int64_t slot_of(const Args& a, int64_t b) { return a.slot ? a.slot[b] : b; }

// The tokens that request b emitted; none if it is padding.
N3_HD int32_t emitted(const Args& a, int64_t b) {
  const int64_t s = slot_of(a, b);
  const int32_t n = a.num_emitted[b];
  if (s < 0 || s >= a.slots || n <= 0) return 0;
  return n < a.width ? n : int32_t(a.width);
}

N3_HD bool is_eos(const Args& a, int32_t token) {
  for (int64_t e = 0; e < a.eos; ++e) {
    if (a.eos_ids[e] == token) return true;
  }
  return false;
}

// Everything of request b, of n emitted tokens, with `before` of the requests before it. add_one(bin) counts in the
// histogram.
template <typename AddOne>
N3_HD void commit(const Args& a, int64_t b, int32_t n, int32_t before, AddOne add_one) {
  const bool live = n > 0;
  const int32_t* own = a.tokens + b * a.width;
  const int32_t first = a.cu_rows[b], end = a.cu_rows[b + 1];
  a.cu_emitted[b] = before;
  a.num_accepted[b] = n;
  a.last_token[b] = live ? own[n - 1] : -1;
  a.last_row[b] = live ? first + n - 1 : -1;
  a.kv_free[b] = live ? end - first - n : 0;
  if (!live) {
    a.kv_start[b] = 0;
    return;
  }
  bool stops = false;
  for (int32_t j = 0; j < n; ++j) {
    a.flat[before + j] = own[j];
    stops = stops || is_eos(a, own[j]);
  }
  const int64_t s = slot_of(a, b);
  int32_t& length = a.seq_len[s * a.seq_stride];
  a.kv_start[b] = length;
  length += n;
  bool full = false;
  if (a.max_len) {
    full = length >= a.max_len[s];
    if (full) length = a.max_len[s];
  }
  if (a.finished) a.finished[s * a.finished_stride] |= int32_t(stops) | int32_t(full) << 1;
  if (a.histogram) add_one(a.histogram + (n < a.bins ? n : a.bins - 1) * a.histogram_stride);
  if (a.ring_pos) {
    int32_t* ring = a.ring_pos + s * a.ring_strides[0];
    int32_t &start = ring[0], &count = ring[a.ring_strides[1]];
    if (count + 2 * a.ring_tokens > a.ring_size) start = int32_t((int64_t(start) + count) % a.ring_size), count = 0;
    count += n;
  }
}

}  // namespace n3::mtp_commit
