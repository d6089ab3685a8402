// The kernels on rows of logits under the emulator, with C entries for tests/mtp/test_mtp_cuda_kernels.py. Grids and
// records are those of the plans; arguments are the kernels' own structures, which the tests fill in as the launchers do.
#include "hopper_emulator.h"

inline int32_t atomicAdd(int32_t* at, int32_t v) { return *at += v, *at - v; }  // one thread runs at a time
inline int32_t atomicMin(int32_t* at, int32_t v) {
  const int32_t old = *at;
  *at = std::min(old, v);
  return old;
}
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline int __clz(int v) { return v ? __builtin_clz(uint32_t(v)) : 32; }

#include "mtp/compare_kernel.cuh"
#include "mtp/cut_kernel.cuh"
#include "mtp/draft_sample_kernel.cuh"
#include "mtp/sample_kernel.cuh"
#include "mtp/tile_kernel.cuh"
#include "mtp/tree_kernel.cuh"
#include "mtp/verify_kernel.cuh"

namespace {

namespace mtp = n3::mtp;
using mtp::RowArgs;

// Calls f with the element type of RowInputs.
template <typename F>
void with_type(int type, F f) {
  if (type == 0) return f.template operator()<float>();
  if (type == 1) return f.template operator()<n3::device::F16>();
  f.template operator()<n3::device::BF16>();
}

struct Records {
  std::vector<double> memory;

  // What the tile and the cut kernel leave of `units`; garbage where they leave nothing.
  Records(RowArgs& a, int64_t units, bool weighs, bool heats, bool reversed) {
    const bool cuts = weighs && (a.top_k || a.top_p || a.min_p);
    const mtp::Workspace w = mtp::workspace(units, a.vocab, a.entries, weighs, heats, cuts);
    memory.resize(w.bytes / 8 + 1);
    std::memset(memory.data(), 0x7f, 8 * memory.size());
    mtp::lay_out(a, w, reinterpret_cast<char*>(memory.data()), weighs, heats, cuts);
    with_type(a.type, [&]<typename T>() {
      emulator::launch(units * a.tiles, mtp::kTileThreads, reversed, [&] { mtp::tile_kernel<T>(a); });
      if (cuts) emulator::launch(units, mtp::kCutThreads, reversed, [&] { mtp::cut_kernel<T>(a); });
    });
  }
};

}  // namespace

extern "C" {

void emulate_sample(const RowArgs* args, const mtp::SampleArgs* out, int64_t units, bool reversed) {
  RowArgs a = *args;
  const Records records(a, units, true, false, reversed);
  with_type(a.type, [&]<typename T>() {
    emulator::launch(units, mtp::kDrawThreads, reversed, [&] { mtp::sample_kernel<T>(a, *out); });
  });
}

// `drafts`: the drafters' rows of logits, or a structure of zeros.
void emulate_verify(const RowArgs* args, const RowArgs* drafts, const mtp::VerifyArgs* call, bool reversed) {
  RowArgs a = *args, q = *drafts;
  const mtp::VerifyArgs& c = *call;
  const int64_t units = int64_t(c.requests) * c.width;
  const Records records(a, units, c.mode != mtp::VerifyMode::kGreedy, c.mode == mtp::VerifyMode::kTypical, reversed);
  if (c.mode <= mtp::VerifyMode::kCoupled) {
    std::vector<int32_t> tokens(units), flags(units);
    std::vector<float> logprobs(units);
    const mtp::SampleArgs own{c.pos, tokens.data(), flags.data(), logprobs.data()};
    with_type(a.type, [&]<typename T>() {
      emulator::launch(units, mtp::kDrawThreads, reversed, [&] { mtp::sample_kernel<T>(a, own); });
    });
    emulator::launch((c.requests + 3) / 4, mtp::kDrawThreads, reversed, [&] { mtp::compare_kernel(a, c, own); });
    return;
  }
  std::unique_ptr<Records> laws;
  std::vector<int32_t> lists(a.vocab + c.laws.mapped);
  mtp::ColumnMap columns{};
  if (q.logits && c.laws.map) {
    columns = {c.laws.map, lists.data(), lists.data() + a.vocab, c.laws.mapped, a.vocab};
    emulator::launch(a.tiles, mtp::kColumnsThreads, reversed, [&] { mtp::columns_kernel(columns); });
  }
  if (q.logits) laws = std::make_unique<Records>(q, units, true, false, reversed);
  with_type(a.type, [&]<typename T>() {
    emulator::launch(c.requests, mtp::kDrawThreads, reversed, [&] {
      if (c.mode <= mtp::VerifyMode::kBlock) return mtp::verify_kernel<T, false>(a, q, columns, c);
      mtp::verify_kernel<T, true>(a, q, columns, c);
    });
  });
}

void emulate_draft_sample(const RowArgs* args, const mtp::DraftSampleArgs* out, bool reversed) {
  RowArgs a = *args;
  const Records records(a, a.rows, false, false, reversed);
  with_type(a.type, [&]<typename T>() {
    emulator::launch(a.rows, mtp::kCutThreads, reversed, [&] { mtp::draft_sample_kernel<T>(a, *out); });
  });
}

void emulate_verify_tree(const RowArgs* args, const mtp::TreeArgs* call, bool reversed) {
  RowArgs a = *args;
  const Records records(a, a.rows, call->mode != mtp::TreeMode::kGreedy, false, reversed);
  with_type(a.type, [&]<typename T>() {
    emulator::launch(a.requests, mtp::kDrawThreads, reversed, [&] {
      if (call->mode == mtp::TreeMode::kToken) return mtp::tree_kernel<T, true>(a, *call);
      mtp::tree_kernel<T, false>(a, *call);
    });
  });
}

int64_t bytes_of_a_unit(int64_t vocab, int64_t entries, bool heats) {
  return mtp::workspace(1024, vocab, entries, true, heats, true).bytes / 1024;
}

int64_t size_of_arguments(int which) {
  const size_t sizes[] = {sizeof(RowArgs), sizeof(mtp::SampleArgs), sizeof(mtp::VerifyArgs),
                          sizeof(mtp::DraftSampleArgs), sizeof(mtp::TreeArgs)};
  return int64_t(sizes[which]);
}

}  // extern "C"
