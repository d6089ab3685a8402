#include "commit.h"

#include <algorithm>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "row.h"

namespace {

namespace commit = n3::mtp_commit;
using n3::ScalarType;
using n3::Tensor;
using n3::mtp::Column;
using n3::mtp::OptionalTensor;

// Element (i, j) of a tensor that is written in place, whatever its strides.
template <typename T>
T& element(const Tensor& t, int64_t i, int64_t j = 0) {
  return static_cast<T*>(t.mutable_data_ptr())[i * t.stride(0) + (j ? j * t.stride(1) : 0)];
}

using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Seven mtp_commit(const Tensor& tokens, const Tensor& num_emitted, const Tensor& cu_rows, const Tensor& seq_len,
                 const OptionalTensor& slot, const OptionalTensor& eos_ids, const OptionalTensor& max_len,
                 const OptionalTensor& finished, const OptionalTensor& histogram, const OptionalTensor& ring_pos,
                 int64_t ring_size, int64_t ring_tokens) {
  const commit::Params p = commit::check(tokens, num_emitted, cu_rows, seq_len, slot, eos_ids, max_len, finished,
                                         histogram, ring_pos, ring_size, ring_tokens);
  const Column<int32_t> token(tokens), emitted(num_emitted), rows(cu_rows), slots(slot), eos(eos_ids), most(max_len);
  const auto ints = [&](int64_t size) { return torch::stable::new_empty(tokens, {size}, ScalarType::Int); };
  const Seven out{ints(p.requests), ints(p.requests), ints(p.requests), ints(p.requests), ints(p.requests),
                  ints(p.requests * p.width), ints(p.requests + 1)};
  const auto data = [](const Tensor& t) { return static_cast<int32_t*>(t.mutable_data_ptr()); };
  int32_t *accepted = data(std::get<0>(out)), *last_token = data(std::get<1>(out)), *last_row = data(std::get<2>(out)),
          *kv_start = data(std::get<3>(out)), *kv_free = data(std::get<4>(out)), *flat = data(std::get<5>(out)),
          *bounds = data(std::get<6>(out));
  std::fill_n(flat, p.requests * p.width, -1);
  bounds[0] = 0;
  for (int64_t b = 0; b < p.requests; ++b) {
    const int64_t s = slots.at(b, int32_t(b));
    const bool live = s >= 0 && s < p.slots && emitted[b] > 0;
    const int32_t a = live ? int32_t(std::min<int64_t>(emitted[b], p.width)) : 0;
    const int32_t* mine = token.data() + b * p.width;
    accepted[b] = a, last_token[b] = last_row[b] = -1, kv_start[b] = kv_free[b] = 0;
    bounds[b + 1] = bounds[b] + a;
    if (!live) continue;
    std::copy_n(mine, a, flat + bounds[b]);
    last_token[b] = mine[a - 1], last_row[b] = rows[b] + a - 1;
    int32_t& length = element<int32_t>(seq_len, s);
    kv_start[b] = length, kv_free[b] = rows[b + 1] - rows[b] - a;
    length += a;
    bool full = false;
    if (most) full = length >= most[s], length = std::min(length, most[s]);
    if (finished) {
      const int32_t* end = eos.data() + eos.size();
      const auto stops = [&](int32_t t) { return std::find(eos.data(), end, t) != end; };
      element<int32_t>(*finished, s) |= int(std::any_of(mine, mine + a, stops)) | int(full) << 1;
    }
    if (histogram) ++element<int64_t>(*histogram, std::min<int64_t>(a, histogram->size(0) - 1));
    if (ring_pos) {
      int32_t &start = element<int32_t>(*ring_pos, s), &count = element<int32_t>(*ring_pos, s, 1);
      if (count + 2 * p.ring_tokens > p.ring_size) start = int32_t((int64_t(start) + count) % p.ring_size), count = 0;
      count += a;
    }
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("mtp_commit", TORCH_BOX(&mtp_commit)); }
