#include "drafts.h"

#include <cmath>

#include "../common/element.h"

namespace n3::mtp {

DraftArgs::DraftArgs(int64_t v, const Tensor& t, const LawArgs& a)
    : vocab(v),
      tokens(t),
      ids(a.draft_ids),
      probs(a.draft_probs),
      logits(a.draft_logits),
      temperature(a.draft_temperature),
      map(a.draft_vocab),
      uniforms(a.uniforms) {
  if (a.draft_ids) width = a.draft_ids->size(1);
  if (logits) {
    columns = logits->size(1), element = element_of(logits->scalar_type());
    stride = logits->stride(0);
  }
}

void DraftLaw::read(int64_t r, int64_t slot, int32_t token) {
  if (args_.logits) return read_logits(r, slot);
  ids_.clear(), q_.clear();
  if (args_.ids) {
    read_listed(r);
  } else if (token >= 0 && token < args_.vocab) {
    ids_.push_back(token), q_.push_back(1);
  }
}

void DraftLaw::read_listed(int64_t r) {
  listed_.clear();
  for (int64_t i = r * args_.width; i < (r + 1) * args_.width; ++i) {
    int64_t id = args_.ids[i];
    if (id >= 0 && args_.map) id = id < args_.map.size() ? args_.map[id] : -1;
    if (id >= 0 && id < args_.vocab) listed_.push_back({int32_t(id), args_.probs[i]});
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
  const void* data = args_.logits->const_data_ptr();
  const auto dtype = args_.logits->scalar_type();
  const int64_t step = args_.logits->stride(1);
  const auto logit = [&](int64_t c) {
    const float x = float_at(data, dtype, r * args_.stride + c * step);
    return x == x ? double(x) : -kInf;
  };
  const auto target = [&](int64_t c) { return args_.map ? int64_t(args_.map[c]) : c; };
  q_.assign(args_.vocab, 0);
  const auto put = [&](int64_t c, double q) {
    if (const int64_t id = target(c); id >= 0 && id < args_.vocab) q_[id] += q;
  };
  double best = -kInf;
  int64_t first = 0;
  for (int64_t c = 0; c < args_.columns; ++c) {
    if (logit(c) > best) best = logit(c), first = c;
  }
  const float temperature = args_.temperature.at(slot, 1.f);
  if (is_greedy(temperature) || std::isinf(best)) return put(first, 1);
  double total = 0;
  for (int64_t c = 0; c < args_.columns; ++c) total += std::exp((logit(c) - best) / temperature);
  for (int64_t c = 0; c < args_.columns; ++c) put(c, std::exp((logit(c) - best) / temperature) / total);
}

double DraftLaw::of(int32_t token) const {
  if (dense()) return q_[token];
  const auto found = std::lower_bound(ids_.begin(), ids_.end(), token);
  return found != ids_.end() && *found == token ? q_[found - ids_.begin()] : 0;
}

}  // namespace n3::mtp
