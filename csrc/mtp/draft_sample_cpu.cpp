// n3::mtp_draft_sample: a draft from the max_ids most probable tokens, and the law it was drawn from.
#include <cmath>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

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

std::tuple<Tensor, Tensor, Tensor> mtp_draft_sample(const Tensor& logits, const Tensor& seed, const Tensor& pos,
                                                    int64_t max_ids, const OptionalTensor& slot,
                                                    const OptionalTensor& temperature,
                                                    const OptionalTensor& draft_vocab) {
  const OptionalTensor none;
  const SlotArgs slots{seed, slot, temperature, none, none, none};
  draft_sample::check(logits, pos, max_ids, slots, draft_vocab);
  const int64_t n = logits.size(0), vocab = logits.size(1);

  const Rows rows(logits, slots, {none, none, none, none, none, none});
  const Column<int64_t> positions(pos);
  const Column<int32_t> map(draft_vocab);
  const Tensor tokens = torch::stable::new_empty(logits, {n}, ScalarType::Int);
  const Tensor ids = torch::stable::new_empty(logits, {n, max_ids}, ScalarType::Int);
  const Tensor probs = torch::stable::new_empty(logits, {n, max_ids}, ScalarType::Float);
  auto* token = static_cast<int32_t*>(tokens.mutable_data_ptr());
  for_items(n, n * vocab, [&](auto take) {
    Row row(rows);
    std::vector<std::pair<float, int32_t>> best;
    for (int64_t r = take(); r < n; r = take()) {
      int32_t* id = static_cast<int32_t*>(ids.mutable_data_ptr()) + r * max_ids;
      float* prob = static_cast<float*>(probs.mutable_data_ptr()) + r * max_ids;
      std::fill_n(id, max_ids, -1);
      std::fill_n(prob, max_ids, 0.f);
      token[r] = -1;
      const int64_t s = rows.slot.at(r, int32_t(r));
      if (s < 0 || s >= rows.slots) continue;
      row.most_probable(r, std::min(max_ids, vocab), best);
      const int64_t count = publish(best, rows.temperature.at(s, 1.f), id, prob);
      const int32_t drawn = id[draw(prob, count, uniform53(rows.seed[s], positions[r], kDraft))];
      token[r] = map ? map[drawn] : drawn;
    }
  });
  return {tokens, ids, probs};
}

}  // namespace
}  // namespace n3::mtp

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("mtp_draft_sample", TORCH_BOX(&n3::mtp::mtp_draft_sample)); }
