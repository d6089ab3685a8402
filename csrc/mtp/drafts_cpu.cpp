#include "drafts.h"

#include <cmath>

namespace n3::mtp {

Request request_of(const RowInputs& rows, const WalkArgs& args, int64_t b) {
  const int32_t first = std::clamp(args.cu_rows[b], 0, rows.rows), end = std::clamp(args.cu_rows[b + 1], 0, rows.rows);
  const int64_t slot = value_or(rows.slot, b, int32_t(b));
  const bool live = slot >= 0 && slot < rows.slots && end > first;
  return {first, end - first, slot, args.pos[b], live, slot >= rows.slots};
}

// The token of an id or a column; -1: none.
int32_t DraftLaw::target_of(int64_t id) const {
  if (laws_.map && id >= 0) id = id < laws_.mapped ? laws_.map[id] : -1;
  return id < vocab_ ? int32_t(id) : -1;
}

void DraftLaw::read(int64_t r, int64_t slot, int32_t token) {
  if (dense()) return read_logits(r, slot);
  ids_.clear(), q_.clear();
  if (laws_.ids) {
    read_listed(r);
  } else if (token >= 0 && token < vocab_) {
    ids_.push_back(token), q_.push_back(1);
  }
}

void DraftLaw::read_listed(int64_t r) {
  listed_.clear();
  for (int64_t i = r * laws_.entries; i < (r + 1) * laws_.entries; ++i) {
    const int32_t id = target_of(laws_.ids[i]);
    if (id >= 0) listed_.push_back({id, laws_.probs[i]});
  }
  std::stable_sort(listed_.begin(), listed_.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
  for (const auto& [id, q] : listed_) {
    if (!ids_.empty() && ids_.back() == id) {
      q_.back() += q;
    } else {
      ids_.push_back(id), q_.push_back(q);
    }
  }
}

void DraftLaw::read_logits(int64_t r, int64_t slot) {
  const auto logit = [&](int64_t c) {
    const float x = logit_at(drafter_.logits, drafter_.type, r * drafter_.stride + c);
    return x == x ? double(x) : -kInf;
  };
  q_.assign(vocab_, 0);
  const auto put = [&](int64_t c, double q) {
    if (const int32_t id = target_of(c); id >= 0) q_[id] += q;
  };
  double best = -kInf;
  int64_t first = 0;
  for (int64_t c = 0; c < drafter_.vocab; ++c) {
    if (logit(c) > best) best = logit(c), first = c;
  }
  const float temperature = value_or(drafter_.temperature, slot, 1.f);
  if (is_greedy(temperature) || std::isinf(best)) return put(first, 1);
  double total = 0;
  for (int64_t c = 0; c < drafter_.vocab; ++c) total += std::exp((logit(c) - best) / temperature);
  for (int64_t c = 0; c < drafter_.vocab; ++c) put(c, std::exp((logit(c) - best) / temperature) / total);
}

double DraftLaw::of(int32_t token) const {
  if (dense()) return q_[token];
  const auto found = std::lower_bound(ids_.begin(), ids_.end(), token);
  return found != ids_.end() && *found == token ? q_[found - ids_.begin()] : 0;
}

}  // namespace n3::mtp
