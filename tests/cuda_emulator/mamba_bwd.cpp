// The backward kernels of the mamba family under the emulator, with C entries for tests/mamba/test_*_bwd_cuda_kernel.py.
#include "hopper_emulator.h"

#include <type_traits>

#include "mamba/conv1d_bwd_kernel.cuh"
#include "mamba/gated_norm_bwd_kernel.cuh"
#include "mamba/partial_sums_kernel.cuh"

namespace {

using n3::mamba::BF16;
using n3::mamba::F16;
using n3::mamba::Type;
namespace conv = n3::causal_conv1d;
namespace mamba = n3::mamba;
namespace norm = n3::gated_norm;

// Calls f with a null pointer of the element type.
template <typename F>
void with_type(Type type, F f) {
  if (type == Type::kFloat) return f(static_cast<float*>(nullptr));
  if (type == Type::kHalf) return f(static_cast<F16*>(nullptr));
  return f(static_cast<BF16*>(nullptr));
}

void add(const mamba::SumArgs& a, bool reversed) {
  const int64_t blocks = (a.rows * a.channels + mamba::kSumColumns - 1) / mamba::kSumColumns;
  emulator::launch(blocks, mamba::kSumColumns * mamba::kSumSlices, reversed, [&] { mamba::sum_kernel(a); });
}

template <typename T, int kVector>
auto kernel_for(int64_t width) {
  return width == 1   ? conv::backward_kernel<T, kVector, 1>
         : width == 2 ? conv::backward_kernel<T, kVector, 2>
         : width == 3 ? conv::backward_kernel<T, kVector, 3>
         : width == 4 ? conv::backward_kernel<T, kVector, 4>
                      : conv::backward_kernel<T, 1, 0>;
}

}  // namespace

extern "C" {

// `sums`: where the totals go; its partial sums are those of `args`.
void emulate_norm_bwd(const norm::BackwardArgs* args, mamba::SumArgs* sums, bool vectors, bool reversed) {
  norm::BackwardArgs b = *args;
  const norm::Args& a = b.forward;
  const norm::BackwardPlan plan = norm::backward_plan(a.rows, a.groups, a.group_size);
  std::vector<float> partial(plan.pieces.count * a.groups * a.group_size, NAN);
  b.partial = partial.data(), b.rows_each = plan.pieces.each, b.held = plan.held;
  with_type(a.x.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto with = [&](auto in_vectors) {
      constexpr bool kVectors = decltype(in_vectors)::value;
      return plan.threads == 64    ? norm::backward_kernel<T, 64, kVectors>
             : plan.threads == 256 ? norm::backward_kernel<T, 256, kVectors>
                                   : norm::backward_kernel<T, 512, kVectors>;
    };
    const auto kernel = vectors ? with(std::true_type()) : with(std::false_type());
    std::memset(emulator::shared_memory, 0x7f, plan.shared);
    emulator::launch(plan.blocks, plan.threads, reversed, [&] { kernel(b); });
  });
  sums->partial = partial.data(), sums->pieces = plan.pieces.count, sums->rows = sums->width = 1;
  add(*sums, reversed);
}

void emulate_conv_bwd(const conv::BackwardArgs* args, mamba::SumArgs* sums, bool vectors, bool reversed) {
  conv::BackwardArgs b = *args;
  conv::Args& a = b.forward;
  const conv::BackwardPlan plan = conv::backward_plan(a.tokens, b.d_initial && a.kept ? a.sequences : 0,
                                                      a.taps.channels, vectors ? conv::kBackwardVector : 1);
  const int64_t rows = a.taps.width + 1;
  std::vector<float> partial(plan.pieces.count * rows * a.taps.channels, NAN);
  b.partial = partial.data(), b.tokens_each = plan.pieces.each;
  a.tiles = uint32_t(plan.pieces.count), a.channel_blocks = uint32_t(plan.channel_blocks);
  with_type(a.x.type, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto kernel =
        vectors ? kernel_for<T, conv::kBackwardVector>(a.taps.width) : kernel_for<T, 1>(a.taps.width);
    emulator::launch(plan.blocks, conv::kThreads, reversed, [&] { kernel(b); });
  });
  sums->partial = partial.data(), sums->pieces = plan.pieces.count, sums->rows = rows, sums->width = a.taps.width;
  add(*sums, reversed);
}

int64_t size_of_arguments(int which) {
  const size_t sizes[] = {sizeof(norm::BackwardArgs), sizeof(conv::BackwardArgs), sizeof(mamba::SumArgs)};
  return int64_t(sizes[which]);
}

}  // extern "C"
