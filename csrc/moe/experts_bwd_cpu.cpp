// The backward of the experts on the CPU: slots sorted by expert, the division of the work, and the sums over a token's
// slots; experts_bwd_kernels.h has the arithmetic.
//
// A group of at most kBlockSlots slots is one item, from its rows to its weights' gradients, all in the cache. Of a
// larger one, and where there are few groups, the blocks of slots are items and then the parts of the weights: in
// rounds of so many blocks as kRoundBytes holds.
#define N3_LANES 4  // the vectors every x86-64 and AArch64 has
#include "experts_bwd_lanes.h"

#include <algorithm>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/buffer.h"
#include "../common/huge_pages.h"
#include "../common/kept_pages.h"
#include "../common/threads.h"
#include "experts_bwd.h"
#include "experts_bwd_engine.h"
#include "products.h"

namespace n3::moe_bwd {

const Kernels kGenericKernels = kKernels;

namespace {

constexpr int64_t kRoundBytes = int64_t(128) << 20;
constexpr int64_t kItemsPerThread = 3;  // below so many groups a thread their blocks are shared out
constexpr int64_t kFewestSlots = 16;    // of a block that is made smaller to have more of them
constexpr int64_t kCopyWork = 8;        // multiply-adds in the time of adding, converting or clearing one float

const Kernels& kernels() {
#if defined(__x86_64__)
  switch (cpu_isa()) {
    case Isa::kAmx:
    case Isa::kAvx512: return kAvx512Kernels;
    case Isa::kAvx2: return kAvx2Kernels;
    case Isa::kGeneric: break;
  }
#endif
  return kGenericKernels;
}

// Zeros: tiles read beyond what is written, and a stray bit pattern might be a subnormal, which is slow.
Buffer<float> zeros(int64_t floats) {
  auto memory = buffer<float>(floats * 4);
  ask_for_huge_pages(memory.get(), floats * 4);
  std::fill_n(memory.get(), floats, 0.f);
  return memory;
}

class Run {
 public:
  Run(const Problem& p, Element element, const std::vector<Slot>& slots, const std::vector<int64_t>& starts)
      : p_(p), element_(element), kernels_(kernels()), slots_(slots), starts_(starts) {
    slot_work_ = p.halves * p.inner * p.width * (p.activation == kNone ? 2 : 3);
    slot_work_ += p.down ? 2 * p.inner * p.width : 0;
    group_floats_ = p.halves * p.inner * p.width + (p.down ? p.inner * p.width : 0);
  }

  void run() {
    std::vector<int64_t> whole, large, empty;
    for (int64_t g = 0; g + 1 < int64_t(starts_.size()); ++g) {
      const int64_t n = count(g);
      (n == 0 ? empty : n <= kBlockSlots ? whole : large).push_back(g);
    }
    const int64_t threads = torch::stable::get_num_threads();
    if (threads > 1 && int64_t(whole.size()) < kItemsPerThread * threads) {
      large.insert(large.end(), whole.begin(), whole.end());
      whole.clear();
    }
    run_whole(whole, empty);
    run_blocks(large, threads);
  }

 private:
  int64_t count(int64_t group) const { return starts_[group + 1] - starts_[group]; }

  // Groups of one block each, and those without slots.
  void run_whole(const std::vector<int64_t>& groups, const std::vector<int64_t>& empty) {
    int64_t most = 0, slots = 0;
    for (const int64_t g : groups) most = std::max(most, count(g)), slots += count(g);
    const int64_t items = groups.size() + empty.size(), parts = kernels_.weight_parts(p_);
    const int64_t work = slots * slot_work_ + items * group_floats_ * kCopyWork;
    for_items(items, work, [&](const auto& take) {
      const int64_t block_floats = kernels_.block_floats(p_, most);
      const auto memory = zeros(groups.empty() ? 0 : block_floats + kernels_.scratch_floats(p_, most));
      for (int64_t i = take(); i < items; i = take()) {
        if (i >= int64_t(groups.size())) {
          clear(empty[i - groups.size()]);
          continue;
        }
        const int64_t g = groups[i];
        const Block block{slots_.data() + starts_[g], count(g), memory.get()};
        kernels_.slots[element_](p_, g, block, memory.get() + block_floats);
        for (int64_t part = 0; part < parts; ++part) {
          kernels_.weights[element_](p_, {g, part, {&block, 1}, nullptr, true, true});
        }
      }
    });
  }

  void clear(int64_t group) {
    const int64_t size = element_size(element_), up = p_.halves * p_.inner * p_.width * size;
    std::fill_n(static_cast<char*>(p_.dup) + group * up, up, char(0));  // memset asks for memory even of no size
    const int64_t down = p_.inner * p_.width * size;
    if (p_.down) std::fill_n(static_cast<char*>(p_.ddown) + group * down, down, char(0));
  }

  // Blocks of one group in a round; begin, end: of the group's slots.
  struct Share {
    int64_t group, first, count;
    bool begin, end;
  };

  void run_blocks(const std::vector<int64_t>& groups, int64_t threads) {
    int64_t slots = 0;
    for (const int64_t g : groups) slots += count(g);
    if (!slots) return;
    // Nearly equal blocks, so many that every thread has some.
    const int64_t wanted = parts_of(slots, kItemsPerThread * threads);
    const int64_t most = std::clamp(whole_tiles(wanted), std::min(kFewestSlots, kBlockSlots), kBlockSlots);
    const int64_t block_floats = kernels_.block_floats(p_, most);
    const int64_t at_once = std::max<int64_t>(kRoundBytes / 4 / std::max<int64_t>(block_floats, 1), threads);
    const auto memory = zeros(block_floats * std::min(at_once, parts_of(slots, most) + int64_t(groups.size())));
    for (const int64_t g : groups) {
      const int64_t blocks = parts_of(count(g), most);
      if (int64_t(blocks_.size()) + blocks > at_once) round();
      for (int64_t i = 0; i < blocks; ++i) {
        if (int64_t(blocks_.size()) == at_once) round();
        const int64_t begin = count(g) * i / blocks, end = count(g) * (i + 1) / blocks;
        if (shares_.empty() || shares_.back().group != g) {
          shares_.push_back({g, int64_t(blocks_.size()), 0, i == 0, false});
        }
        shares_.back().count += 1;
        shares_.back().end = i + 1 == blocks;
        float* at = memory.get() + blocks_.size() * block_floats;
        blocks_.push_back({slots_.data() + starts_[g] + begin, end - begin, at});
      }
    }
    round();
  }

  // All blocks gathered so far, then the gradients of their groups' weights. At most one group of a round goes on from
  // another: one that needs several rounds begins its own.
  void round() {
    const int64_t blocks = blocks_.size(), parts = kernels_.weight_parts(p_), items = shares_.size() * parts;
    int64_t most = 0, slots = 0;
    for (const Block& block : blocks_) most = std::max(most, block.count), slots += block.count;
    std::vector<int64_t> groups(blocks);
    for (const Share& s : shares_) std::fill_n(groups.begin() + s.first, s.count, s.group);
    for_items(blocks, slots * slot_work_, [&](const auto& take) {
      const auto scratch = zeros(kernels_.scratch_floats(p_, most));
      for (int64_t i = take(); i < blocks; i = take()) {
        kernels_.slots[element_](p_, groups[i], blocks_[i], scratch.get());
      }
    });
    for (const Share& s : shares_) {
      if (!sums_ && !(s.begin && s.end)) sums_ = zeros(kernels_.sum_floats(p_));
    }
    for_items(items, slots * slot_work_, [&](const auto& take) {
      for (int64_t i = take(); i < items; i = take()) {
        const Share& s = shares_[i / parts];
        const std::span<const Block> own(blocks_.data() + s.first, s.count);
        kernels_.weights[element_](p_, {s.group, i % parts, own, sums_.get(), s.begin, s.end});
      }
    });
    blocks_.clear();
    shares_.clear();
  }

  const Problem& p_;
  Element element_;
  const Kernels& kernels_;
  const std::vector<Slot>& slots_;
  const std::vector<int64_t>& starts_;
  int64_t slot_work_, group_floats_;
  std::vector<Block> blocks_;  // of the round
  std::vector<Share> shares_;
  Buffer<float> sums_;
};

template <typename T>
void sum_rows_as(const float* dx, int64_t width, const std::vector<int64_t>& rows, const std::vector<int64_t>& starts,
                 T* out) {
  const int64_t count = int64_t(starts.size()) - 1;
  for_items(count, int64_t(rows.size()) * width * kCopyWork, [&](const auto& take) {
    std::vector<float> sum(width);
    for (int64_t i = take(); i < count; i = take()) {
      std::fill(sum.begin(), sum.end(), 0.f);
      for (int64_t j = starts[i]; j < starts[i + 1]; ++j) {
        const float* row = dx + rows[j] * width;
        for (int64_t c = 0; c < width; ++c) sum[c] += row[c];
      }
      for (int64_t c = 0; c < width; ++c) out[i * width + c] = from_float<T>(sum[c]);
    }
  });
}

}  // namespace

void run(const Problem& p, Element element, const std::vector<Slot>& slots, const std::vector<int64_t>& starts) {
  Run(p, element, slots, starts).run();
}

Buffer<float> row_floats(int64_t count, int64_t width) {
  auto memory = buffer<float>(count * width * 4);
  ask_for_huge_pages(memory.get(), count * width * 4);
  return memory;
}

void sum_rows(const float* dx, int64_t width, const std::vector<int64_t>& rows, const std::vector<int64_t>& starts,
              Element element, void* out) {
  switch (element) {
    case kFloat: return sum_rows_as(dx, width, rows, starts, static_cast<float*>(out));
    case kHalf: return sum_rows_as(dx, width, rows, starts, static_cast<Half*>(out));
    case kBFloat16: return sum_rows_as(dx, width, rows, starts, static_cast<BFloat16*>(out));
  }
}

}  // namespace n3::moe_bwd

namespace n3::moe_experts_bwd {
namespace {

using moe_bwd::Slot;

moe_bwd::Activation activation_of(moe_experts::Activation a) {
  switch (a) {
    case moe_experts::Activation::kSilu: return moe_bwd::kSilu;
    case moe_experts::Activation::kGelu: return moe_bwd::kGelu;
    case moe_experts::Activation::kRelu2: break;
  }
  return moe_bwd::kRelu2;
}

// The slots by expert, ascending in each, and by token; those of other experts are left out.
struct Sorted {
  std::vector<Slot> slots;
  std::vector<int64_t> starts;           // of each expert, and the end
  std::vector<int64_t> rows, row_starts;  // of each token, and the end

  Sorted(const Params& p, const int32_t* ids, float* dweights) : starts(p.experts + 1) {
    const int64_t count = p.tokens * p.top_k;
    const auto expert_of = [&](int64_t slot) { return ids[slot] - p.first_expert; };
    const auto here = [&](int64_t slot) { return ids[slot] >= p.first_expert && expert_of(slot) < p.experts; };
    for (int64_t s = 0; s < count; ++s) {
      if (s % p.top_k == 0) row_starts.push_back(rows.size());
      if (here(s)) {
        rows.push_back(s);
        ++starts[expert_of(s) + 1];
      } else {
        dweights[s] = 0;
      }
    }
    row_starts.push_back(rows.size());
    for (int64_t e = 0; e < p.experts; ++e) starts[e + 1] += starts[e];
    slots.resize(rows.size());
    std::vector<int64_t> next = starts;
    for (const int64_t s : rows) slots[next[expert_of(s)]++] = {s, s / p.top_k, s / p.top_k};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& x, const Tensor& w_up,
                                                    const Tensor& w_down, const Tensor& ids, const Tensor& weights,
                                                    const std::string& activation, int64_t first_expert) {
  const Params f = check(grad_y, x, w_up, w_down, ids, weights, activation, first_expert);
  std::vector<Tensor> alive;
  const auto data = [&](const Tensor& t) { return alive.emplace_back(torch::stable::contiguous(t)).const_data_ptr(); };
  const Tensor dx = torch::stable::new_empty(x, x.sizes());
  const Tensor dweights = torch::stable::new_empty(weights, weights.sizes());
  const Tensor dup = new_in_kept_pages(w_up), ddown = new_in_kept_pages(w_down);
  auto* const dweights_data = static_cast<float*>(dweights.mutable_data_ptr());
  if (f.width == 0) {  // an empty W_down has no address, and none means that there is no W_down
    std::fill_n(dweights_data, dweights.numel(), 0.f);
    return {dx, dup, ddown, dweights};
  }
  const Sorted sorted(f, static_cast<const int32_t*>(data(ids)), dweights_data);
  const auto rows = moe_bwd::row_floats(f.tokens * f.top_k, f.width);
  moe_bwd::Problem p{};
  p.x = data(x), p.grad = data(grad_y), p.up = data(w_up), p.down = data(w_down);
  p.weights = static_cast<const float*>(data(weights)), p.dweights = dweights_data;
  p.dx = rows.get(), p.dup = dup.mutable_data_ptr(), p.ddown = ddown.mutable_data_ptr();
  p.width = f.width, p.inner = f.inner, p.halves = f.activation == moe_experts::Activation::kRelu2 ? 1 : 2;
  p.activation = activation_of(f.activation);
  const Element element = element_of(x.scalar_type());
  moe_bwd::run(p, element, sorted.slots, sorted.starts);
  moe_bwd::sum_rows(rows.get(), f.width, sorted.rows, sorted.row_starts, element, dx.mutable_data_ptr());
  return {dx, dup, ddown, dweights};
}

}  // namespace
}  // namespace n3::moe_experts_bwd

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) { m.impl("moe_experts_bwd", TORCH_BOX(&n3::moe_experts_bwd::backward)); }
