#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../common/cpu.h"
#include "../common/written.h"
#include "ssm_replay.h"
#include "ssm_update_call.h"
#include "written_slots.h"

#define N3_LANES 4  // the vectors every x86-64 and AArch64 has
#include "ssm_replay_lanes.h"

namespace n3::ssm_replay {

const Kernels kGenericKernels = {replay};

namespace {

using ssm_update::floats_of;
using ssm_update::Layout;
using ssm_update::view_of;

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

void check_slot_values(const char* op, const Indices& source, int64_t batch, int64_t slots) {
  int64_t largest = -1;
  for (int64_t b = 0; source.data && b < batch; ++b) largest = std::max(largest, source(b));
  N3_CHECK(op, largest < slots, "state_indices must be below the number of slots ", slots, ", got ", largest);
}

void check_distinct(const char* op, const Indices& source, int64_t batch) {
  mamba::WrittenSlots written;
  for (int64_t b = 0; b < batch; ++b) written.add(source(b));
  written.check(op, "state_indices");
}

int64_t element_bytes(const Operand& o) { return o.dtype == ScalarType::Float ? 4 : 2; }

// The position (start, count) of a slot's ring.
struct Position {
  int32_t* data;
  int64_t stride;

  Position(const Ring& ring, int64_t slot)
      : data(static_cast<int32_t*>(ring.pos.data) + slot * ring.pos.strides[0]), stride(ring.pos.strides[1]) {}
  int32_t& start() const { return data[0]; }
  int32_t& count() const { return data[stride]; }
};

// The slot's state and ring, as the kernels want them; whatever its position says, the ring is not left.
Sequence sequence_of(const Operand& state, const Layout& layout, const Ring& ring, int64_t slot) {
  const auto at = [&](const Operand& o) { return static_cast<char*>(o.data) + slot * o.strides[0] * element_bytes(o); };
  const Position position(ring, slot);
  const int64_t size = std::max<int64_t>(ring.size, 1);
  Sequence q{};
  static char no_elements;  // a state without any (d_state 0) has no memory, yet it is not padding
  q.state = {state.data ? at(state) : &no_elements, nullptr, &layout, 0};
  q.x = at(ring.x), q.B = at(ring.B), q.dt = reinterpret_cast<float*>(at(ring.dt));
  q.start = (position.start() % size + size) % size;
  q.count = std::clamp<int64_t>(position.count(), 0, ring.size);
  return q;
}

void set_ring(Problem& p, const Ring& ring) {
  p.size = ring.size, p.element = ssm_update::element_of(ring.x.dtype);
  std::copy_n(ring.x.strides + 1, 3, p.x_strides);
  std::copy_n(ring.B.strides + 1, 3, p.B_strides);
  std::copy_n(ring.dt.strides + 1, 2, p.dt_strides);
}

void run(const Problem& p) {
  const ssm_update::Problem& u = p.update;
  constexpr int64_t kThreadWork = 1 << 14;  // elements of states: some 5 us
  const int64_t grain = std::max<int64_t>(1, kThreadWork / std::max<int64_t>(1, kBlock * u.d_state));
  const int64_t items = u.batch * u.heads * ssm_update::blocks(u);
  torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<float[]> workspace(new float[ssm_update::workspace_floats(u) + workspace_floats(p)]);
    kernels().replay(p, workspace.get(), begin, end);
  });
}

// ---- update

std::vector<int32_t> checked_parents(const char* op, const UpdateParams& p) {
  std::vector<int32_t> parents(p.parents.data ? p.batch * p.tokens : 0);
  // Token by token, as the reference finds the first wrong one.
  for (int64_t t = 0; p.parents.data && t < p.tokens; ++t) {
    for (int64_t b = 0; b < p.batch; ++b) {
      if (p.source(b) < 0) continue;
      const int64_t parent = p.parents(b, t);
      N3_CHECK(op, parent >= -1 && parent < t, "parents must be between -1 and t - 1 for token t, got ", parent,
               " for token ", t);
      parents[b * p.tokens + t] = int32_t(parent);
    }
  }
  return parents;
}

Tensor update(Tensor state, Tensor ring_x, Tensor ring_B, Tensor ring_dt, const Tensor& ring_pos, const Tensor& x,
              const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
              const OptionalTensor& z, const OptionalTensor& dt_bias, const OptionalTensor& state_indices,
              const OptionalTensor& parents, bool dt_softplus, double dt_min, std::optional<double> dt_max) {
  const UpdateParams p = check_update(state, ring_x, ring_B, ring_dt, ring_pos, x, dt, A, B, C, D, z, dt_bias,
                                      state_indices, parents, dt_softplus, dt_min, dt_max);
  check_written("ssm_replay_update", "state", state);
  check_written("ssm_replay_update", "ring_x", ring_x);
  check_written("ssm_replay_update", "ring_B", ring_B);
  check_written("ssm_replay_update", "ring_dt", ring_dt);
  check_slot_values("ssm_replay_update", p.source, p.batch, p.slots);
  const std::vector<int32_t> parent = checked_parents("ssm_replay_update", p);
  check_distinct("ssm_replay_update", p.source, p.batch);
  const Tensor y = torch::stable::new_empty(x, std::vector<int64_t>(x.sizes().begin(), x.sizes().end()));

  const Layout layout{{p.state.strides[1], p.state.strides[2], p.state.strides[3]}, {0, 0}};
  std::vector<Sequence> sequences(p.batch);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t slot = p.source(b);
    if (slot < 0) continue;
    sequences[b] = sequence_of(p.state, layout, p.ring, slot);
    sequences[b].fold = fold_is_due(sequences[b].count, p.tokens, p.ring.size);
    if (!parent.empty()) sequences[b].parents = parent.data() + b * p.tokens;
  }
  const std::vector<float> decay = floats_of(p.A, p.heads);
  const std::vector<float> bias = p.dt_bias.data ? floats_of(p.dt_bias, p.heads) : std::vector<float>();
  const bool channels = p.D.strides[1] != 0;
  const std::vector<float> skip =
      p.D.data ? floats_of(p.D, p.heads, channels ? p.head_dim : 1) : std::vector<float>();
  Problem problem{};
  ssm_update::Problem& u = problem.update;
  u.batch = p.batch, u.tokens = p.tokens, u.heads = p.heads, u.head_dim = p.head_dim, u.groups = p.groups;
  u.d_state = p.d_state;
  u.x = view_of(p.x), u.z = view_of(p.z), u.dt = view_of(p.dt), u.B = view_of(p.B), u.C = view_of(p.C);
  u.A = decay.data(), u.dt_bias = p.dt_bias.data ? bias.data() : nullptr;
  u.D = p.D.data ? skip.data() : nullptr, u.D_has_channels = channels;
  u.state = ssm_update::element_of(p.state.dtype);
  u.dt_softplus = p.dt_softplus, u.dt_min = p.dt_min, u.dt_max = p.dt_max;
  const int64_t inner = p.heads * p.head_dim;
  u.y = {y.mutable_data_ptr(), u.x.element, {p.tokens * inner, inner, p.head_dim, 1}};
  set_ring(problem, p.ring);
  problem.sequences = sequences.data();
  run(problem);
  return y;
}

// ---- commit

// Moves the entries of an accepted path to the front of the call's tokens. It rises, so that none is overwritten
// before it has moved.
class Mover {
 public:
  Mover(const CommitParams& p, int64_t slot, int64_t first) : p_(p), slot_(slot), first_(first) {}

  void move(int64_t from, int64_t to) const {
    if (from == to) return;
    const Ring& r = p_.ring;
    copy(r.x, from, to, p_.heads, p_.head_dim, r.x.strides[3]);
    copy(r.B, from, to, p_.groups, p_.d_state, r.B.strides[3]);
    copy(r.dt, from, to, 1, p_.heads, r.dt.strides[2]);
  }

 private:
  // An entry is rows of n elements.
  void copy(const Operand& o, int64_t from, int64_t to, int64_t rows, int64_t n, int64_t stride) const {
    const int64_t size = element_bytes(o);
    char* const slot = static_cast<char*>(o.data) + slot_ * o.strides[0] * size;
    for (int64_t row = 0; row < rows; ++row) {
      const char* in = slot + (place(from) * o.strides[1] + row * (rows > 1 ? o.strides[2] : 0)) * size;
      char* out = slot + (place(to) * o.strides[1] + row * (rows > 1 ? o.strides[2] : 0)) * size;
      if (stride == 1 && n > 0) {  // of no elements there is no memory
        std::memmove(out, in, n * size);
      } else {
        for (int64_t i = 0; i < n; ++i) std::memcpy(out + i * stride * size, in + i * stride * size, size);
      }
    }
  }

  int64_t place(int64_t token) const {
    const int64_t size = p_.ring.size;
    return ((first_ + token) % size + size) % size;
  }

  const CommitParams& p_;
  int64_t slot_, first_;
};

void commit(Tensor ring_pos, Tensor ring_x, Tensor ring_B, Tensor ring_dt, const Tensor& num_accepted, int64_t tokens,
            const OptionalTensor& path, const OptionalTensor& state_indices) {
  constexpr const char* op = "ssm_replay_commit";
  const CommitParams p = check_commit(ring_pos, ring_x, ring_B, ring_dt, num_accepted, tokens, path, state_indices);
  check_written(op, "ring_pos", ring_pos);
  check_written(op, "ring_x", ring_x);
  check_written(op, "ring_B", ring_B);
  check_written(op, "ring_dt", ring_dt);
  check_slot_values(op, p.source, p.batch, p.ring.slots);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t accepted = p.num_accepted(b);
    N3_CHECK(op, accepted >= 0 && accepted <= tokens, "num_accepted must be between 0 and ", tokens, ", got ",
             accepted);
  }
  check_distinct(op, p.source, p.batch);
  constexpr int64_t kThreadWork = 1 << 16;  // elements moved
  const int64_t entry = p.path.data ? p.heads * p.head_dim * tokens : 1;
  torch::stable::parallel_for(0, p.batch, std::max<int64_t>(1, kThreadWork / std::max<int64_t>(1, entry)),
                              [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t slot = p.source(b), accepted = p.num_accepted(b);
      if (slot < 0) continue;
      const Position position(p.ring, slot);
      const int64_t behind = int64_t(position.start()) + position.count();
      const Mover mover(p, slot, behind);
      for (int64_t i = 0; p.path.data && i < accepted; ++i) mover.move(p.path(b, i), i);
      const bool folded = fold_is_due(position.count(), tokens, p.ring.size);
      if (folded) position.start() = int32_t(behind % p.ring.size);
      position.count() = int32_t(accepted + (folded ? 0 : position.count()));
    }
  });
}

// ---- flush

void flush(Tensor state, Tensor ring_pos, const Tensor& ring_x, const Tensor& ring_B, const Tensor& ring_dt,
           const Tensor& A, const OptionalTensor& state_indices) {
  const FlushParams p = check_flush(state, ring_pos, ring_x, ring_B, ring_dt, A, state_indices);
  check_written("ssm_replay_flush", "state", state);
  check_written("ssm_replay_flush", "ring_pos", ring_pos);
  check_slot_values("ssm_replay_flush", p.source, p.batch, p.slots);
  check_distinct("ssm_replay_flush", p.source, p.batch);
  const Layout layout{{p.state.strides[1], p.state.strides[2], p.state.strides[3]}, {0, 0}};
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.source(b) < 0) continue;
    const Sequence q = sequence_of(p.state, layout, p.ring, p.source(b));
    if (q.count == 0) continue;
    sequences.push_back(q);
    sequences.back().fold = true;
  }
  const std::vector<float> decay = floats_of(p.A, p.heads);
  Problem problem{};
  ssm_update::Problem& u = problem.update;
  u.batch = int64_t(sequences.size()), u.heads = p.heads, u.head_dim = p.head_dim, u.groups = p.groups;
  u.d_state = p.d_state, u.A = decay.data(), u.state = ssm_update::element_of(p.state.dtype);
  set_ring(problem, p.ring);
  problem.sequences = sequences.data();
  run(problem);
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.source(b) < 0) continue;
    const Position position(p.ring, p.source(b));
    if (p.ring.size) position.start() = int32_t((int64_t(position.start()) + position.count()) % p.ring.size);
    position.count() = 0;
  }
}

}  // namespace
}  // namespace n3::ssm_replay

STABLE_TORCH_LIBRARY_IMPL(n3, CPU, m) {
  m.impl("ssm_replay_update", TORCH_BOX(&n3::ssm_replay::update));
  m.impl("ssm_replay_commit", TORCH_BOX(&n3::ssm_replay::commit));
  m.impl("ssm_replay_flush", TORCH_BOX(&n3::ssm_replay::flush));
}
