// One request of mtp_verify as its kernels see it, and where its results go. Rules in n3kernels/mtp/verify.py.
#pragma once
#include "rows.cuh"

namespace n3::mtp {

N3_DEVICE bool is_eos(const WalkArgs& c, int32_t token) {
  bool found = false;
  for (int32_t i = 0; i < c.eos_count; ++i) found |= c.eos[i] == token;
  return found;
}

// Drafts of a request: it ends at the first missing one, and behind one that is an EOS. By a whole warp.
struct Chain32 {
  int32_t count;
  bool ends;  // the last is an EOS
};

N3_DEVICE Chain32 chain_of(const RowArgs& a, const VerifyArgs& c, const Unit& u) {
  const int32_t most = u.rows - 1 < a.width - 1 ? u.rows - 1 : a.width - 1;
  for (int32_t start = 0; start < most; start += 32) {
    const int32_t i = start + lane_id(), draft = i < most ? c.drafts[u.first + i] : -1;
    const int missing = __ffs(__ballot_sync(kAll, draft < 0)), eos = __ffs(__ballot_sync(kAll, is_eos(c, draft)));
    if (eos && (!missing || eos < missing)) return {start + eos, true};
    if (missing) return {start + missing - 1, false};
  }
  return {most, false};
}

// Given by row, or Philox's; of siblings by their number.
N3_DEVICE double accept_uniform(const WalkArgs& c, int64_t row, int64_t seed, int64_t pos, int32_t sibling = 0) {
  return c.uniforms ? c.uniforms[2 * row] : uniform(seed, pos, kAccept, sibling);
}
N3_DEVICE double final_uniform(const WalkArgs& c, int64_t row, int64_t seed, int64_t pos) {
  return c.uniforms ? c.uniforms[2 * row + 1] : uniform53(seed, pos, kResidual);
}

// The results of a request of which `count` tokens are emitted; nothing stays behind them. By threads of `step`.
N3_DEVICE void finish(const RowArgs& a, const VerifyArgs& c, const Unit& u, int32_t count, uint32_t flags,
                      int32_t thread, int32_t step) {
  const int64_t at = int64_t(u.request) * a.width;
  for (int32_t i = count + thread; i < a.width; i += step) c.tokens[at + i] = -1, c.logprobs[at + i] = 0.f;
  if (thread != 0) return;
  c.num_emitted[u.request] = count;
  c.last_row[u.request] = count ? u.first + count - 1 : -1;
  c.flags[u.request] = int32_t(flags | (u.slot >= a.slots ? kOutOfRange : 0));
}

}  // namespace n3::mtp
