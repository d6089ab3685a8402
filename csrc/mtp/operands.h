// From the tensors of a checked call to pointers, and its outputs. CPU and CUDA.
#pragma once
#include <tuple>
#include <type_traits>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "inputs.h"
#include "rows.h"

namespace n3::mtp {

// Copies of what is not contiguous live as long as this.
class Operands {
 public:
  template <typename T>
  const T* data(const Tensor& t) {
    kept_.push_back(torch::stable::contiguous(t));
    return static_cast<const T*>(kept_.back().const_data_ptr());
  }
  template <typename T>
  const T* data(const OptionalTensor& t) {
    return t ? data<T>(*t) : nullptr;
  }

  // An output, and where it lies.
  template <typename T>
  static Tensor output(const Tensor& like, std::initializer_list<int64_t> shape, T*& at) {
    const ScalarType dtype = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Int;
    const Tensor t = torch::stable::new_empty(like, shape, dtype);
    at = static_cast<T*>(t.mutable_data_ptr());
    return t;
  }

  // Logits with stride 1 along the last dimension.
  RowInputs rows(const Tensor& logits, const SlotArgs& s, const EditArgs& e) {
    kept_.push_back(logits);
    RowInputs r{};
    r.logits = logits.const_data_ptr(), r.stride = logits.stride(0);
    r.type = logits.scalar_type() == ScalarType::Float ? 0 : logits.scalar_type() == ScalarType::Half ? 1 : 2;
    r.vocab = int32_t(logits.size(1)), r.rows = int32_t(logits.size(0)), r.slots = int32_t(s.seed.size(0));
    r.slot = data<int32_t>(s.slot), r.seed = data<int64_t>(s.seed), r.temperature = data<float>(s.temperature);
    r.top_k = data<int32_t>(s.top_k), r.top_p = data<float>(s.top_p), r.min_p = data<float>(s.min_p);
    r.bitmask = data<int32_t>(e.bitmask), r.bitmask_row = data<int32_t>(e.bitmask_row);
    r.mask_rows = e.bitmask ? int32_t(e.bitmask->size(0)) : 0;
    r.forced = data<int32_t>(e.forced_token);
    r.bias_ids = data<int32_t>(e.bias_ids), r.bias_val = data<float>(e.bias_val);
    r.bias_cu = data<int32_t>(e.bias_cu), r.biases = e.bias_ids ? int32_t(e.bias_ids->size(0)) : 0;
    return r;
  }

  LawInputs laws(const LawArgs& a) {
    return {data<int32_t>(a.draft_ids), data<float>(a.draft_probs), data<int32_t>(a.draft_vocab),
            a.draft_ids ? int32_t(a.draft_ids->size(1)) : 0, a.draft_vocab ? int32_t(a.draft_vocab->size(0)) : 0};
  }

  // All of a walk's arguments but the outputs.
  void walk(WalkArgs& w, const Tensor& cu_rows, const Tensor& drafts, const Tensor& pos, const OptionalTensor& eos_ids,
            const LawArgs& a, int64_t width) {
    w.cu_rows = data<int32_t>(cu_rows), w.drafts = data<int32_t>(drafts), w.pos = data<int64_t>(pos);
    w.eos = data<int32_t>(eos_ids), w.eos_count = eos_ids ? int32_t(eos_ids->size(0)) : 0;
    w.uniforms = data<double>(a.uniforms), w.laws = laws(a);
    w.requests = int32_t(cu_rows.size(0) - 1), w.width = int32_t(width);
  }

 private:
  std::vector<Tensor> kept_;
};

// Tokens, counts, rows (of the last token, or of each), log-probabilities and flags.
using WalkOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

}  // namespace n3::mtp
