// The arguments that the launchers hand to CUTLASS's kernels, and CUTLASS's own opinion of them, with C entries for
// test_gemm_cuda_args.py. Host functions alone: no kernel is instantiated, so that nvcc takes seconds.
#include <cstring>

#include "nvfp4/grouped_gemm_sm120.cuh"
#include "nvfp4/grouped_gemm_sm100.cuh"
#include "nvfp4/gemm_sm100.cuh"
#include "nvfp4/gemm_sm120.cuh"

namespace {

namespace gemm = n3::nvfp4_gemm;
namespace grouped = n3::nvfp4_grouped_gemm;
namespace sm100 = n3::nvfp4_gemm::sm100;
namespace sm120 = n3::nvfp4_gemm::sm120;
using cutlass::bfloat16_t;

enum Kernel { kSmall100, kLarge100, kSquare120, kFloat100, kFloat120, kGrouped100, kGrouped120 };

// What the epilogue reads of a call, in the order of gemm::Call.
struct Seen {
  const void *a, *a_scale, *b, *b_scale, *a_global, *b_global, *bias, *y;
  int64_t a_global_per_row, b_global_per_row, m, n, k, a_stride, b_stride, y_stride, sms;
};

template <class K, class T>
bool dense(const gemm::Call& c, void* to) {
  const auto args = gemm::sm1xx::arguments<K, T>(c);
  const auto& tree = args.epilogue.thread;
  const Seen seen{args.mainloop.ptr_A,
                  args.mainloop.ptr_SFA,
                  args.mainloop.ptr_B,
                  args.mainloop.ptr_SFB,
                  tree.op_1.op_0.ptr_col,
                  tree.op_0.ptr_row,
                  tree.op_2.ptr_row,
                  args.epilogue.ptr_D,
                  cute::get<0>(tree.op_1.op_0.dCol),
                  cute::get<1>(tree.op_0.dRow),
                  cute::get<0>(args.problem_shape),
                  cute::get<1>(args.problem_shape),
                  cute::get<2>(args.problem_shape),
                  cute::get<0>(args.mainloop.dA),
                  cute::get<0>(args.mainloop.dB),
                  cute::get<0>(args.epilogue.dD),
                  args.hw_info.sm_count};
  std::memcpy(to, &seen, sizeof seen);
  return args.mode == cutlass::gemm::GemmUniversalMode::kGemm && K::can_implement(args);
}

template <class K, class T>
bool of_groups(const grouped::Groups& g, void** seen) {
  const auto args = grouped::sm1xx::arguments<K, T>(g);
  const auto& tree = args.epilogue.thread;
  const void* all[] = {args.problem_shape.problem_shapes,
                       args.mainloop.ptr_A,
                       args.mainloop.dA,
                       args.mainloop.ptr_SFA,
                       args.mainloop.layout_SFA,
                       args.mainloop.ptr_B,
                       args.mainloop.dB,
                       args.mainloop.ptr_SFB,
                       args.mainloop.layout_SFB,
                       tree.op_1.op_0.ptr_col,
                       tree.op_0.ptr_col,
                       args.epilogue.ptr_D,
                       args.epilogue.dD};
  std::memcpy(seen, all, sizeof all);
  return args.mode == cutlass::gemm::GemmUniversalMode::kGrouped && args.problem_shape.num_groups == g.experts &&
         !cute::get<0>(tree.op_0.dCol) &&
         bool(cute::get<0>(tree.op_1.op_0.dCol)) == g.call.a_global_per_row && args.hw_info.sm_count == g.call.sms &&
         K::can_implement(args);
}

}  // namespace

extern "C" {

// Whether CUTLASS takes the call.
bool dense_arguments(int kernel, const gemm::Call* call, void* seen) {
  switch (Kernel(kernel)) {
    case kSmall100: return dense<sm100::tensor_gemm_sm100<sm100::Small, bfloat16_t>, bfloat16_t>(*call, seen);
    case kLarge100: return dense<sm100::tensor_gemm_sm100<sm100::Large, bfloat16_t>, bfloat16_t>(*call, seen);
    case kSquare120: return dense<sm120::tensor_gemm_sm120<bfloat16_t>, bfloat16_t>(*call, seen);
    case kFloat100: return dense<sm100::tensor_gemm_sm100<sm100::Small, float>, float>(*call, seen);
    default: return dense<sm120::tensor_gemm_sm120<float>, float>(*call, seen);
  }
}

bool grouped_arguments(int kernel, const gemm::Call* call, int64_t experts, char* memory, void** seen) {
  grouped::Groups groups{*call, nullptr, experts, 2, nullptr, {}};
  grouped::place(groups.arrays, memory, experts);
  if (Kernel(kernel) == kGrouped100) {
    return of_groups<grouped::sm100::tensor_grouped_gemm_sm100<bfloat16_t>, bfloat16_t>(groups, seen);
  }
  return of_groups<grouped::sm120::tensor_grouped_gemm_sm120<bfloat16_t>, bfloat16_t>(groups, seen);
}

}  // extern "C"
