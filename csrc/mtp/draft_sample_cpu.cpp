// n3::mtp_draft_sample: a draft from the max_ids most probable tokens, and the law it was drawn from.
#include <cmath>

#include <torch/csrc/stable/library.h>

#include "../common/threads.h"
#include "draft_sample.h"
#include "row.h"

namespace n3::mtp {
namespace {

// The drafter's law of one row, cut and divided; its length. `best`: the most probable tokens with their logits.
int64_t publish(const std::vector<std::pair<float, int32_t>>& best, float temperature, int32_t* ids, float* probs) {
  if (best.empty() || is_greedy(temperature) || std::isinf(best[0].first)) {
    ids[0] = best.empty() ? 0 : best[0].second, probs[0] = 1;
    return 1;
  }
  double weight[kMaxDraftIds], total = 0;
  int64_t kept = 0;
  for (; kept < int64_t(best.size()); ++kept) {
    weight[kept] = std::exp((double(best[kept].first) - best[0].first) / temperature);
    if (!(weight[kept] > 0)) break;
    total += weight[kept];
  }
  for (int64_t i = 0; i < kept; ++i) ids[i] = best[i].second, probs[i] = float(weight[i] / total);
  return kept;
}

// The first at which the running sum of the published law passes u times its total.
int64_t draw(const float* probs, int64_t count, double u) {
  double total = 0, running = 0;
  for (int64_t i = 0; i < count; ++i) total += probs[i];
  for (int64_t i = 0; i < count; ++i) {
    running += probs[i];
    if (running > u * total) return i;
  }
  return count - 1;
}

void mtp_draft_sample(const draft_sample::Call& call) {
  const RowInputs& rows = call.rows;
  const DraftSampleArgs& a = call.args;
  for_items(rows.rows, int64_t(rows.rows) * rows.vocab, [&](auto take) {
    Row row(rows);
    std::vector<std::pair<float, int32_t>> best;
    for (int64_t r = take(); r < rows.rows; r = take()) {
      int32_t* ids = a.ids + r * a.max_ids;
      float* probs = a.probs + r * a.max_ids;
      std::fill_n(ids, a.max_ids, -1);
      std::fill_n(probs, a.max_ids, 0.f);
      a.tokens[r] = -1;
      const int64_t s = value_or(rows.slot, r, int32_t(r));
      if (s < 0 || s >= rows.slots) continue;
      row.most_probable(r, std::min(a.max_ids, rows.vocab), best);
      const int64_t count = publish(best, value_or(rows.temperature, s, 1.f), ids, probs);
      const int32_t drawn = ids[draw(probs, count, uniform53(rows.seed[s], a.pos[r], kDraft))];
      a.tokens[r] = value_or(a.map, drawn, drawn);
    }
  });
}

}  // namespace
}  // namespace n3::mtp

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) {
  m.impl("mtp_draft_sample", TORCH_BOX(&n3::mtp::draft_sample::entry<n3::mtp::mtp_draft_sample>));
}
