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
using Code = cutlass::float_e2m1_t;

enum Kernel {
  kSmall100, kLarge100, kSquare120, kFloat100, kFloat120, kCodesSmall100, kCodesLarge100, kCodes120, kGrouped100,
  kGrouped120
};

// What the epilogue reads of a call, in the order of gemm::Call.
struct Seen {
  const void *a, *a_scale, *b, *b_scale, *a_global, *b_global, *bias, *y;
  int64_t a_global_per_row, b_global_per_row, m, n, k;
  const void *scale, *scale_global;
  int64_t swizzled, relu2, a_stride, b_stride, y_stride, sms;
};

// The part of the epilogue before the codes, and what they are made with.
template <class T, class Tree>
auto affine(const Tree& tree) {
  if constexpr (gemm::sm1xx::is_code<T>) {
    return std::pair(tree.op_0, tree.op_1);
  } else {
    return std::pair(tree, gemm::Codes{});
  }
}

template <class K, class T>
bool dense(const gemm::Call& c, void* to) {
  const auto args = gemm::sm1xx::arguments<K, T>(c);
  const auto [tree, codes] = affine<T>(args.epilogue.thread);
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
                  codes.scale,
                  codes.global,
                  codes.swizzled,
                  codes.relu2,
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

// Row and column in its tile of every element of every thread, in the order of registers, as the epilogue asks for them:
// out[thread][epi_n][epi_m][element][2]. Returns the number of elements.
template <class Coords>
int list(const Coords& coords, int*& out) {
  const int elements = int(cute::size<0>(coords) * cute::size<1>(coords) * cute::size<2>(coords));
  for (int n = 0; n < cute::size<4>(coords); ++n) {
    for (int m = 0; m < cute::size<3>(coords); ++m) {
      const auto of_tile = coords(cute::_, cute::_, cute::_, m, n);
      for (int i = 0; i < elements; ++i) {
        *out++ = int(cute::get<0>(of_tile(i)));
        *out++ = int(cute::get<1>(of_tile(i)));
      }
    }
  }
  return elements;
}

// Never called, for its type: an address in tensor memory is nothing to a host.
template <class K>
auto tensor_memory_copy() {
  using Epilogue = typename K::CollectiveEpilogue;
  const auto shape = cute::partition_shape_C(typename K::TiledMma{}, cute::take<0, 2>(typename K::TileShape{}));
  const auto acc = K::TiledMma::make_fragment_C(shape)(cute::make_coord(cute::_, cute::_), 0, 0);
  const auto of_tile = cute::flat_divide(acc, typename Epilogue::EpilogueTile{});
  return cute::make_tmem_copy(typename Epilogue::CopyOpT2R{}, of_tile(cute::_, cute::_, 0, 0));
}

template <class K>
int coordinates_sm100(int* out) {
  using Epilogue = typename K::CollectiveEpilogue;
  const decltype(tensor_memory_copy<K>()) copy;
  const auto coords = cute::flat_divide(
      cute::make_identity_tensor(cute::take<0, 2>(typename Epilogue::CtaTileShape{})), typename Epilogue::EpilogueTile{});
  int elements = 0;
  for (int thread = 0; thread < 128; ++thread) elements = list(copy.get_slice(thread).partition_D(coords), out);
  return elements;
}

template <class K>
int coordinates_sm120(int* out) {
  using Epilogue = typename K::CollectiveEpilogue;
  const auto atom = cute::make_tiled_copy_C_atom(typename Epilogue::CopyAtomC{}, typename K::TiledMma{});
  const auto copy = cute::make_tiled_copy_S(cute::Copy_Atom<typename Epilogue::CopyOpR2S, Code>{}, atom);
  const auto coords = cute::flat_divide(cute::make_identity_tensor(cute::take<0, 2>(typename K::TileShape{})),
                                        typename Epilogue::EpilogueTile{});
  int elements = 0;
  for (int thread = 0; thread < 256; ++thread) elements = list(copy.get_slice(thread).partition_S(coords), out);
  return elements;
}

}  // namespace

extern "C" {

int coordinates(int kernel, int* out) {
  switch (Kernel(kernel)) {
    case kCodesSmall100: return coordinates_sm100<sm100::tensor_gemm_sm100<sm100::Small, Code>>(out);
    case kCodesLarge100: return coordinates_sm100<sm100::tensor_gemm_sm100<sm100::Large, Code>>(out);
    default: return coordinates_sm120<sm120::tensor_gemm_sm120<Code>>(out);
  }
}

// Whether CUTLASS takes the call.
bool dense_arguments(int kernel, const gemm::Call* call, void* seen) {
  switch (Kernel(kernel)) {
    case kSmall100: return dense<sm100::tensor_gemm_sm100<sm100::Small, bfloat16_t>, bfloat16_t>(*call, seen);
    case kLarge100: return dense<sm100::tensor_gemm_sm100<sm100::Large, bfloat16_t>, bfloat16_t>(*call, seen);
    case kSquare120: return dense<sm120::tensor_gemm_sm120<bfloat16_t>, bfloat16_t>(*call, seen);
    case kCodesSmall100: return dense<sm100::tensor_gemm_sm100<sm100::Small, Code>, Code>(*call, seen);
    case kCodesLarge100: return dense<sm100::tensor_gemm_sm100<sm100::Large, Code>, Code>(*call, seen);
    case kCodes120: return dense<sm120::tensor_gemm_sm120<Code>, Code>(*call, seen);
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
