// The fused mixer of prompts. A thread takes a group of heads of a sequence through all of its chunks: convolution of
// 64 tokens of the group's channels, scan, gate and norm, in memory that stays in the level-2 cache. zxbcdt is read
// once and the output written once. Every part runs the kernels of its own operator, with float32 in between, so that
// float32 inputs give the bits of the composition.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/element.h"
#include "../common/written.h"
#include "conv1d_engine.h"
#include "gated_norm_kernels.h"
#include "mixer.h"
#include "sequences_cpu.h"
#include "ssm_update_call.h"
#include "written_slots.h"

#define N3_LANES 4  // for the gate of a mixer without norm
#include "../common/lanes.h"

namespace n3::mamba2 {
namespace {

using ConvSequence = causal_conv1d::Sequence;
using ssd_scan::kChunk;

// Not ConvSequence::initial, which is false where the convolution has no state (one tap).
bool has_initial(const causal_conv1d::Params& c, int64_t sequence) {
  const bool* given = static_cast<const bool*>(c.has_initial.data);
  return !given || given[sequence * c.has_initial.strides[0]];
}

// ---- gate and norm

struct Weights {
  causal_conv1d::TileTaps taps;  // of all channels
  std::vector<float> norm;
};

// Columns of `count` channels from `first` on, of one row.
class Finish {
 public:
  Finish(const PrefillParams& p, const Weights& weights, void* out)
      : p_(p), m_(p.mixer), norm_(weights.norm), out_(out), element_(element_of(p.z.dtype)),
        size_(element_size(p.z.dtype)), scratch_(gated_norm::scratch_floats(m_.group_size)) {}

  const char* z_at(const ConvSequence& s, int64_t number, int64_t token, int64_t first) const {
    const Operand& o = p_.z;
    const int64_t start = number * o.strides[0] + (p_.conv.length ? 0 : s.row) * o.strides[1];
    return static_cast<const char*>(o.data) + (start + token * o.strides[1] + first) * size_;
  }

  char* out_at(const ConvSequence& s, int64_t token, int64_t first) const {
    return static_cast<char*>(out_) + ((s.row + token) * m_.inner + first) * size_;
  }

  void run(const float* y, const ConvSequence& s, int64_t number, int64_t token, int64_t first, int64_t count) {
    const char* z = z_at(s, number, token, first);
    char* to = out_at(s, token, first);
    if (m_.norm_weight.data) {
      kernels_.forward_from_float[element_]({y, z, norm_.data() + first, to, scratch_.data(), count / m_.group_size,
                                             m_.group_size, m_.eps, m_.norm_before_gate,
                                             z + p_.z.strides[1] * size_});
      return;
    }
    switch (element_) {
      case kFloat: return gate(y, reinterpret_cast<const float*>(z), reinterpret_cast<float*>(to), count);
      case kHalf: return gate(y, reinterpret_cast<const Half*>(z), reinterpret_cast<Half*>(to), count);
      case kBFloat16: gate(y, reinterpret_cast<const BFloat16*>(z), reinterpret_cast<BFloat16*>(to), count);
    }
  }

 private:
  template <typename T>
  static void gate(const float* y, const T* z, T* to, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(y + i) * silu(load(z + i)));
    if (i < count) store_part(to + i, load_part(y + i, count - i) * silu(load_part(z + i, count - i)), count - i);
  }

  const PrefillParams& p_;
  const Mixer& m_;
  const gated_norm::Kernels& kernels_ = gated_norm::kernels();
  const std::vector<float>& norm_;
  void* out_;
  Element element_;
  int64_t size_;
  std::vector<float> scratch_;
};

// ---- one group of heads of a sequence

// Rows of memory to ask for, line by line. They lie pages apart, where the hardware does not look ahead.
struct Ahead {
  static constexpr int64_t kLine = 64;

  const char* row;
  int64_t step, bytes, rows, byte = 0;

  int64_t lines() const { return rows * ((bytes + kLine - 1) / kLine); }

  // Of the next `lines` lines; returns how many of them were left.
  int64_t ask(int64_t lines) {
    for (; lines > 0 && rows > 0; --lines) {
      __builtin_prefetch(row + byte, 0, 2);
      if ((byte += kLine) >= bytes) byte = 0, row += step, --rows;
    }
    return lines;
  }
};

// A thread's memory for one item after the other.
class GroupMixer final : public ssd_scan::Stage {
 public:
  // `whole`: float32 rows of all channels for y, where the norm comes later; else null.
  GroupMixer(const PrefillParams& p, const Weights& weights, int64_t heads, float* whole, void* out)
      : p_(p), m_(p.mixer), taps_(weights.taps), past_(m_.width - 1), size_(element_size(p.conv.x.dtype)),
        whole_(whole), finish_(p, weights, out), x_(kChunk * heads * m_.head_dim), y_(whole ? 0 : x_.size()),
        B_(kChunk * m_.d_state), C_(B_.size()), history_(past_ * (heads * m_.head_dim + 2 * m_.d_state) * size_),
        rows_(kChunk + past_) {}

  void run(const ConvSequence& s, ssd_scan::Item item, int64_t first_head, int64_t heads) {
    sequence_ = &s, number_ = item.sequence, channel_ = first_head * m_.head_dim, count_ = heads * m_.head_dim;
    const int64_t groups = m_.groups * m_.d_state, of_group = item.group * m_.d_state;
    char* history = history_.data();
    const auto range = [&](int64_t first, int64_t count, float* to) {
      const Range r{{first, count}, history, to};
      history += past_ * count * size_;
      return r;
    };
    ranges_[0] = range(channel_, count_, x_.data());
    ranges_[1] = range(m_.inner + of_group, m_.d_state, B_.data());
    ranges_[2] = range(m_.inner + groups + of_group, m_.d_state, C_.data());
    for (const Range& r : ranges_) read_history(r);

    // Rows of the chunk; heads count from the first of the model, channels begin with the first of this item.
    ssd_scan::Params scan = p_.scan;
    scan.x = {x_.data() - channel_, ScalarType::Float, {0, count_, m_.head_dim, 1}};
    scan.B = {B_.data(), ScalarType::Float, {0, m_.d_state, 0, 1}};
    scan.C = {C_.data(), ScalarType::Float, {0, m_.d_state, 0, 1}};
    scan.y_row = whole_ ? m_.inner : count_;
    scan.y = whole_ ? whole_ + s.row * m_.inner : y_.data() - channel_;
    scan_ = &scan;
    item.stage = this;
    ssd_scan::kernels().run(scan, item, ssd_scan::scratch_of_thread(scratch_floats(scan, item)));
  }

  void before(int64_t start, int64_t n, int64_t steps) override {
    for (const Range& r : ranges_) convolve(r, start, n);
    if (whole_) scan_->y = whole_ + (sequence_->row + start) * m_.inner;
    look_ahead(start, n, steps);
  }

  void meanwhile() override {
    for (int64_t left = lines_of_step_; left > 0 && next_ < ahead_.size(); next_ += left > 0) {
      left = ahead_[next_].ask(left);
    }
  }

  void after(int64_t start, int64_t n) override {
    for (int64_t i = 0; i < n && !whole_; ++i) {
      finish_.run(y_.data() + i * count_, *sequence_, number_, start + i, channel_, count_);
    }
  }

 private:
  static constexpr int64_t kTile = 512;  // channels whose rows stay in the level-1 cache

  struct Range {
    causal_conv1d::Tile channels;
    char* history;  // [width - 1, channels]
    float* to;      // [kChunk, channels]
  };

  static int64_t scratch_floats(const ssd_scan::Params& scan, const ssd_scan::Item& item) {
    return ssd_scan::kernels().scratch_floats(scan, item.end - item.begin);
  }

  void read_history(const Range& r) {
    const causal_conv1d::Params& c = p_.conv;
    const int64_t floats = past_ * r.channels.count;
    if (!sequence_->initial) {
      std::fill_n(r.history, floats * size_, char(0));
    } else if (floats) {
      const auto columns = causal_conv1d::columns_of(c.initial, sequence_->slot, r.channels, c.kept - past_, past_);
      conv_.gather[causal_conv1d::copy_kernel(c.x.dtype)](columns, r.history, r.channels.count);
    }
  }

  // What the end of this chunk reads and writes, and what the next one reads.
  void look_ahead(int64_t start, int64_t n, int64_t steps) {
    ahead_.clear(), next_ = 0;
    if (!whole_) {
      const char* z = finish_.z_at(*sequence_, number_, start, channel_);
      ahead_.push_back({z, p_.z.strides[1] * size_, count_ * size_, n});
      ahead_.push_back({finish_.out_at(*sequence_, start, channel_), m_.inner * size_, count_ * size_, n});
    }
    const Operand& x = p_.conv.x;
    const int64_t next = start + kChunk, rows = std::min(kChunk, sequence_->length - next);
    for (const Range& r : ranges_) {
      const int64_t at = sequence_->offset + next * x.strides[1] + r.channels.first;
      ahead_.push_back({static_cast<const char*>(x.data) + at * size_, x.strides[1] * size_, r.channels.count * size_,
                        rows});
    }
    int64_t lines = 0;
    for (const Ahead& a : ahead_) lines += std::max<int64_t>(a.lines(), 0);
    lines_of_step_ = (lines + steps - 1) / std::max<int64_t>(steps, 1);
  }

  void convolve(const Range& r, int64_t start, int64_t n) {
    const Operand& o = p_.conv.x;
    const int64_t tap_stride = taps_.stride();
    for (int64_t c = 0; c < r.channels.count; c += kTile) {
      for (int64_t i = 0; i < past_ + n; ++i) {
        const int64_t token = start - past_ + i, at = sequence_->offset + token * o.strides[1] + r.channels.first + c;
        rows_[i] = token < 0 ? r.history + ((token + past_) * r.channels.count + c) * size_
                             : static_cast<const char*>(o.data) + at * size_;
      }
      const int64_t first = r.channels.first + c, count = std::min(kTile, r.channels.count - c);
      conv_.fir_to_float[element_of(o.dtype)]({rows_.data(), taps_.weight() + first, taps_.bias() + first,
                                                      r.to + c, n, count, m_.width, tap_stride, r.channels.count,
                                                      p_.conv.taps.silu});
    }
  }

  const PrefillParams& p_;
  const Mixer& m_;
  const causal_conv1d::Kernels& conv_ = causal_conv1d::kernels();
  const causal_conv1d::TileTaps& taps_;
  int64_t past_, size_;
  float* whole_;
  Finish finish_;
  std::vector<float> x_, y_, B_, C_;  // [kChunk, channels of the item], [kChunk, d_state]
  std::vector<char> history_;
  std::vector<const void*> rows_;
  Range ranges_[3];
  std::vector<Ahead> ahead_;
  size_t next_ = 0;  // of ahead_
  int64_t lines_of_step_ = 0;
  const ConvSequence* sequence_ = nullptr;
  int64_t number_ = 0, channel_ = 0, count_ = 0;  // the sequence's number; the item's first channel and their number
  ssd_scan::Params* scan_ = nullptr;
};

// ---- the whole

// Into how many items the heads of a group are split: enough for all threads.
int64_t parts_of_group(const PrefillParams& p) {
  const int64_t items = std::max<int64_t>(1, p.conv.sequences * p.mixer.groups);
  const int64_t threads = torch::stable::get_num_threads(), heads = p.mixer.heads / p.mixer.groups;
  return std::clamp<int64_t>((threads + items - 1) / items, 1, heads);
}

void run(const PrefillParams& p, void* out) {
  const Mixer& m = p.mixer;
  const std::vector<ConvSequence> sequences = causal_conv1d::sequences_of(p.conv);
  mamba::check_distinct(prefill_op, sequences);
  causal_conv1d::clear_padding(p.conv, sequences, m.inner, out);

  Weights weights{{causal_conv1d::kernels(), p.conv.taps, m.channels}, {}};
  if (m.norm_weight.data) weights.norm = ssm_update::floats_of(m.norm_weight, m.inner);
  weights.taps.load({0, m.channels});
  const int64_t of_group = m.heads / m.groups, parts = parts_of_group(p);
  const bool later = parts > 1 || (m.norm_weight.data && m.inner / m.groups % m.group_size);
  std::vector<float> whole(later ? p.conv.tokens * m.inner : 0);

  struct Work {
    int64_t sequence, group, first_head, heads;
  };
  std::vector<Work> work;
  std::vector<std::vector<ssd_scan::Checkpoint>> checkpoints(sequences.size());
  for (size_t s = 0; s < sequences.size(); ++s) {
    for (const auto& c : sequences[s].checkpoints) checkpoints[s].push_back({c.tokens - 1, c.slot});
    for (int64_t i = 0; sequences[s].slot >= 0 && i < m.groups * parts; ++i) {
      const int64_t begin = i % parts * of_group / parts, end = (i % parts + 1) * of_group / parts;
      work.push_back({int64_t(s), i / parts, i / parts * of_group + begin, end - begin});
    }
  }
  std::stable_sort(work.begin(), work.end(), [&](const Work& a, const Work& b) {
    return sequences[a.sequence].length > sequences[b.sequence].length;
  });
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, int64_t(work.size()), 1, [&](int64_t, int64_t) {
    GroupMixer mixer(p, weights, (of_group + parts - 1) / parts, later ? whole.data() : nullptr, out);
    const int64_t panels = ssd_scan::panels_of(ssd_scan::kernels(), m.head_dim);
    for (size_t i = next++; i < work.size(); i = next++) {
      const Work& w = work[i];
      const ConvSequence& s = sequences[w.sequence];
      const int64_t in_group = w.first_head - w.group * of_group;
      ssd_scan::Item item{};
      item.sequence = w.sequence, item.first = p.conv.length ? 0 : s.row, item.length = s.length, item.slot = s.slot;
      item.has_initial = has_initial(p.conv, w.sequence);
      item.checkpoints = checkpoints[w.sequence].data();
      item.checkpoint_count = int64_t(checkpoints[w.sequence].size());
      item.group = w.group, item.begin = in_group * panels, item.end = (in_group + w.heads) * panels;
      mixer.run(s, item, w.first_head, w.heads);
    }
  });
  causal_conv1d::keep_states(p.conv, sequences);
  if (!later || m.inner == 0) return;

  const int64_t group_size = m.norm_weight.data ? m.group_size : m.inner, groups = m.inner / group_size;
  for (size_t number = 0; number < sequences.size(); ++number) {
    const ConvSequence& s = sequences[number];
    if (s.slot < 0) continue;
    torch::stable::parallel_for(0, s.length * groups, 16, [&](int64_t begin, int64_t end) {
      Finish finish(p, weights, out);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t token = i / groups, first = i % groups * group_size;
        finish.run(whole.data() + (s.row + token) * m.inner + first, s, int64_t(number), token, first, group_size);
      }
    });
  }
}

Tensor prefill(const Tensor& given, const Tensor& conv_weight, const OptionalTensor& conv_bias, Tensor conv_state,
               Tensor ssm_state, const Tensor& state_indices, const Tensor& A, const OptionalTensor& D,
               const OptionalTensor& dt_bias, const OptionalTensor& norm_weight, const OptionalTensor& has_initial,
               const OptionalTensor& cu_seqlens, const OptionalTensor& checkpoint_tokens,
               const OptionalTensor& checkpoint_indices, std::optional<int64_t> group_size, double eps,
               bool norm_before_gate, const std::optional<std::string>& activation, int64_t chunk_size,
               bool dt_softplus, double dt_min, std::optional<double> dt_max) {
  const bool side_by_side = given.dim() == 0 || given.size(-1) <= 1 || given.stride(-1) == 1;
  const Tensor zxbcdt = side_by_side ? given : torch::stable::contiguous(given);
  const PrefillParams p = check_prefill(zxbcdt, conv_weight, conv_bias, conv_state, ssm_state, state_indices, A, D,
                                        dt_bias, norm_weight, has_initial, cu_seqlens, checkpoint_tokens,
                                        checkpoint_indices, group_size, eps, norm_before_gate, activation, chunk_size,
                                        dt_softplus, dt_min, dt_max);
  check_written(prefill_op, "conv_state", conv_state);
  check_written(prefill_op, "ssm_state", ssm_state);
  mamba::check_prefill_values(prefill_op, "zxbcdt", p.conv);
  std::vector<int64_t> shape(zxbcdt.sizes().begin(), zxbcdt.sizes().end());
  shape.back() = p.mixer.inner;
  const Tensor out = torch::stable::new_empty(zxbcdt, shape);
  run(p, out.mutable_data_ptr());
  return out;
}

}  // namespace
}  // namespace n3::mamba2

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("mamba2_prefill", TORCH_BOX(&n3::mamba2::prefill)); }
