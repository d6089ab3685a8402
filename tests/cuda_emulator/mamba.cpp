// The mamba kernels under the emulator, with C entries for tests/mamba/test_*_cuda_kernel.py. The grids are those of the
// plans; arguments are the kernels' own structures, which the tests fill in as the launchers do.
#include "cuda_emulator.h"

#include <type_traits>

#include "mamba/conv1d_kernel.cuh"
#include "mamba/conv1d_update_kernel.cuh"
#include "mamba/gated_norm_kernel.cuh"
#include "mamba/mamba2_decode_kernel.cuh"
#include "mamba/mamba2_prefill_kernel.cuh"
#include "mamba/ssm_replay_kernel.cuh"
#include "mamba/ssm_update_kernel.cuh"
#include "mamba/stage_kernel.cuh"

namespace {

using n3::mamba::BF16;
using n3::mamba::E4m3;
using n3::mamba::F16;
using n3::mamba::Type;
namespace conv = n3::causal_conv1d;
namespace mamba = n3::mamba;
namespace mamba2 = n3::mamba2;
namespace norm = n3::gated_norm;
namespace replay = n3::ssm_replay;
namespace update = n3::ssm_update;

// Calls f with a null pointer of the element type.
template <typename F>
void with_type(Type type, F f) {
  if (type == Type::kFloat) return f(static_cast<float*>(nullptr));
  if (type == Type::kHalf) return f(static_cast<F16*>(nullptr));
  return f(static_cast<BF16*>(nullptr));
}

template <typename F>
void with_state(Type type, F f) {
  if (type == Type::kInt8) return f(static_cast<int8_t*>(nullptr));
  if (type == Type::kE4m3) return f(static_cast<E4m3*>(nullptr));
  with_type(type, f);
}

// y in the dtype of x; of a mixer in float16, saturated.
template <typename T, typename Y>
void run_conv(conv::Args a, bool vectors, bool reversed) {
  constexpr int kVector = 16 / sizeof(T);
  const bool few = a.taps.width <= conv::kFewTaps;
  const int64_t states = a.kept ? a.checkpoints + (a.state_indices.data ? 0 : a.sequences) : 0;
  const conv::Plan plan = conv::plan(a.tokens, states, a.taps.channels, vectors ? kVector : 1);
  a.tiles = uint32_t(plan.tiles), a.channel_blocks = uint32_t(plan.channel_blocks);
  const auto kernel = vectors ? conv::forward_kernel<T, Y, kVector, true>
                      : few   ? conv::forward_kernel<T, Y, 1, true>
                              : conv::forward_kernel<T, Y, 1, false>;
  emulator::launch(plan.blocks, conv::kThreads, reversed, [&] { kernel(a); });
}

}  // namespace

extern "C" {

void emulate_norm(const norm::Args* a, bool vectors, bool reversed) {
  const norm::Plan plan = norm::plan(a->rows, a->groups, a->group_size);
  with_type(a->x.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto with = [&](auto in_vectors) {
      constexpr bool kVectors = decltype(in_vectors)::value;
      return plan.threads == 32    ? norm::forward_kernel<T, 32, kVectors>
             : plan.threads == 128 ? norm::forward_kernel<T, 128, kVectors>
                                   : norm::forward_kernel<T, 512, kVectors>;
    };
    const auto kernel = vectors ? with(std::true_type()) : with(std::false_type());
    emulator::launch(plan.blocks, norm::block_threads(plan.threads), reversed, [&] { kernel(*a); });
  });
}

void emulate_conv(const conv::Args* args, bool vectors, bool reversed) {
  with_type(args->x.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    run_conv<T, T>(*args, vectors, reversed);
  });
}

void emulate_mixed_conv(const conv::Args* args, bool vectors, bool reversed) {
  args->x.type == Type::kHalf ? run_conv<F16, mamba::Saturated>(*args, vectors, reversed)
                              : run_conv<BF16, mamba::Saturated>(*args, vectors, reversed);
}

void emulate_conv_states(const conv::Args* args, bool reversed) {
  with_type(args->x.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    conv::Args a = *args;
    a.channel_blocks = uint32_t(conv::ceil_div(a.taps.channels, conv::kThreads));
    emulator::launch(a.kept ? a.sequences * a.channel_blocks : 0, conv::kThreads, reversed,
                     [&] { conv::final_kernel<T>(a); });
  });
}

// The last launch of a prefill.
void emulate_prefill_finish(const mamba2::FinishArgs* args, const mamba2::PrefillSizes* sizes, bool vectors,
                            bool reversed) {
  const mamba2::PrefillPlan plan = mamba2::prefill_plan(*sizes);
  mamba2::FinishArgs a = *args;
  a.norm_blocks = uint32_t(plan.norm_blocks), a.conv.channel_blocks = uint32_t(plan.channel_blocks);
  a.norm.groups = plan.groups;
  with_type(a.conv.x.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto with = [&](auto in_vectors) {
      constexpr bool kVectors = decltype(in_vectors)::value;
      return plan.threads == 32    ? mamba2::finish_kernel<T, 32, kVectors>
             : plan.threads == 128 ? mamba2::finish_kernel<T, 128, kVectors>
                                   : mamba2::finish_kernel<T, 512, kVectors>;
    };
    const auto kernel = vectors ? with(std::true_type()) : with(std::false_type());
    emulator::launch(plan.blocks, norm::block_threads(plan.threads), reversed, [&] { kernel(a); });
  });
}

void emulate_stage(const mamba::Slots* slots, const mamba::Sources* sources, int pieces, uint8_t* copied) {
  emulator::launch(slots->batch * pieces, mamba::kStageThreads, false,
                   [&] { mamba::stage_kernel<mamba::kStageThreads>(*slots, *sources, pieces, copied); });
}

void emulate_conv_update(const conv::UpdateArgs* args, bool reversed) {
  with_type(args->x.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    conv::UpdateArgs a = *args;
    a.channel_blocks = conv::update_channel_blocks(a.taps.channels);
    emulator::launch(a.slots.batch * a.channel_blocks, conv::kUpdateThreads, reversed,
                     [&] { conv::update_kernel<T>(a); });
  });
}

void emulate_ssm_update(const update::Args* args, bool reversed) {
  with_state(args->state.type, [&](auto* type) {
    using State = std::remove_pointer_t<decltype(type)>;
    update::Args a = *args;
    const update::Plan p = update::plan(a.slots.batch, a.heads, a.head_dim, a.d_state, a.vectors);
    a.tiles = p.tiles;
    const bool tree = a.slots.parents.data;
    const auto kernel =
        !p.shape.vectors       ? update::update_kernel<State, mamba::Row<32, 8, false>, true>
        : p.shape.lanes == 16  ? (tree ? update::update_kernel<State, mamba::Row<16, 4, true>, true>
                                       : update::update_kernel<State, mamba::Row<16, 4, true>, false>)
        : tree                 ? update::update_kernel<State, mamba::Row<8, 4, true>, true>
                               : update::update_kernel<State, mamba::Row<8, 4, true>, false>;
    emulator::launch(p.blocks, update::kThreads, reversed, [&] { kernel(a); });
  });
}

void emulate_decode(const mamba2::DecodeArgs* a, bool reversed) {
  with_state(a->ssm.state.type, [&](auto* type) {
    using State = std::remove_pointer_t<decltype(type)>;
    std::memset(emulator::dynamic_shared, 0x7f, sizeof emulator::dynamic_shared);  // NaN
    const auto kernel = a->ssm.d_state <= 128 ? mamba2::decode_kernel<State, mamba::Row<8, 4, true>>
                                              : mamba2::decode_kernel<State, mamba::Row<16, 4, true>>;
    emulator::launch(a->ssm.slots.batch * a->groups, mamba2::kDecodeThreads, reversed, [&] { kernel(*a); });
  });
}

void emulate_finish(const mamba2::NormArgs* a, const mamba::Slots* slots, float* u, int64_t groups) {
  emulator::launch(slots->batch * slots->tokens * groups, mamba2::kDecodeThreads, false,
                   [&] { mamba2::finish_kernel<mamba2::kDecodeThreads>(*a, *slots, u, groups); });
}

// Of a flush (no tokens) the position too.
void emulate_replay(const replay::Args* args, const replay::MoveArgs* position, bool reversed) {
  with_type(args->ssm.state.type, [&](auto* type) {
    using State = std::remove_pointer_t<decltype(type)>;
    replay::Args a = *args;
    const update::Plan p =
        update::plan(a.ssm.slots.batch, a.ssm.heads, a.ssm.head_dim, a.ssm.d_state, a.ssm.vectors);
    a.ssm.tiles = p.tiles;
    const bool tree = a.ssm.slots.parents.data;
    const auto kernel = !p.shape.vectors ? replay::replay_kernel<State, mamba::Row<32, 8, false>, true>
                        : tree           ? replay::replay_kernel<State, mamba::Row<8, 4, true>, true>
                                         : replay::replay_kernel<State, mamba::Row<8, 4, true>, false>;
    emulator::launch(p.blocks, update::kThreads, reversed, [&] { kernel(a); });
  });
  if (!args->flush) return;
  emulator::launch(replay::move_blocks(position->batch), replay::kMoveThreads, reversed,
                   [&] { replay::position_kernel<replay::kMoveThreads>(*position); });
}

void emulate_commit(const replay::MoveArgs* args, bool reversed) {
  replay::MoveArgs a = *args;
  a.blocks = replay::move_blocks(a.heads * (a.head_dim + 1) + a.groups * a.d_state);
  emulator::launch(a.path.data ? a.batch * a.blocks : 0, replay::kMoveThreads, reversed,
                   [&] { replay::move_kernel<replay::kMoveThreads>(a); });
  emulator::launch(replay::move_blocks(a.batch), replay::kMoveThreads, reversed,
                   [&] { replay::position_kernel<replay::kMoveThreads>(a); });
}

// Sizes of the structures, for the tests to compare with their own.
int64_t size_of_arguments(int which) {
  const size_t sizes[] = {sizeof(norm::Args),         sizeof(conv::Args),   sizeof(mamba::Slots),
                          sizeof(mamba::Sources),     sizeof(conv::UpdateArgs), sizeof(update::Args),
                          sizeof(mamba2::DecodeArgs), sizeof(replay::Args), sizeof(replay::MoveArgs),
                          sizeof(mamba2::FinishArgs), sizeof(mamba2::PrefillSizes)};
  return int64_t(sizes[which]);
}

}  // extern "C"
