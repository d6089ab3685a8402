// y = (a b^T) * a_global * b_global + bias on block-scaled tensor cores, built of CUTLASS's collectives.
//
// The main loop copies codes and scales by TMA and multiplies them as they are: the instruction decodes e2m1, applies
// one e4m3 scale to every 16 and sums in fp32 (tcgen05.mma.block_scale on sm_100, mma.sync.block_scale on sm_120). The
// epilogue is a tree of CUTLASS's visitors: acc * a_global * b_global + bias in fp32, rounded once to y. Both global
// scales are read on the device, as one element or one per row of the operand: the strides (bool) are set at run time.
// Of nvfp4_gemm.quantized a last node makes codes and block scales of that.
#pragma once
#include <type_traits>

#include <cutlass/cutlass.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/dispatch_policy.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "gemm_quantized_sm1xx.cuh"
#include "gemm_sm1xx.h"
#include "gemm_sm1xx_args.h"

namespace n3::nvfp4_gemm::sm1xx {

namespace fusion = cutlass::epilogue::fusion;
using cute::_0;
using cute::_1;
using cute::Stride;

template <Out kOut>
struct ElementOf {
  using Type = float;
};
template <>
struct ElementOf<Out::kHalf> {
  using Type = cutlass::half_t;
};
template <>
struct ElementOf<Out::kBFloat16> {
  using Type = cutlass::bfloat16_t;
};
template <>
struct ElementOf<Out::kCodes> {
  using Type = cutlass::float_e2m1_t;
};
template <Out kOut>
using Element = typename ElementOf<kOut>::Type;

template <class T>
constexpr bool is_code = std::is_same_v<T, Element<Out::kCodes>>;

using ScaledCodes = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
constexpr int kCodesPerCopy = 32;  // 16 bytes

template <template <class> class kOp, class T>
using Compute = fusion::Sm90Compute<kOp, T, float, cutlass::FloatRoundStyle::round_to_nearest>;

// Rows are b's: the columns of y.
template <class CtaTile, class T>
using Epilogue = fusion::Sm90EVT<
    Compute<cutlass::homogeneous_multiply_add, T>,
    fusion::Sm90RowBroadcast<0, CtaTile, float, float, Stride<_0, bool, _0>, 4, false>,  // b_global
    fusion::Sm90EVT<Compute<cutlass::multiplies, float>,
                    fusion::Sm90ColBroadcast<0, CtaTile, float, float, Stride<bool, _0, _0>, 1, false>,  // a_global
                    fusion::Sm90AccFetch>,
    fusion::Sm90RowBroadcast<0, CtaTile, T, float>>;  // bias, null: 0

template <class G, class T>
struct EpilogueOf {
  using Type = Epilogue<typename G::CtaTile, T>;
};
template <class G>
struct EpilogueOf<G, Element<Out::kCodes>> {
  using Type = fusion::Sm90EVT<typename G::CodesNode, Epilogue<typename G::CtaTile, float>>;
};

// G is a geometry of gemm_sm100.cuh or gemm_sm120.cuh. Layouts with a * are arrays, one for each group.
template <class G, class T, class ProblemShape, class Fusion, class RowMajor, class ColumnMajor>
struct Collective {
  static constexpr int kPerCopy = 128 / cutlass::sizeof_bits_v<T>;
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      typename G::Arch, cutlass::arch::OpClassBlockScaledTensorOp, typename G::MmaTile, typename G::Cluster,
      typename G::EpilogueTile, float, float, void, RowMajor, kPerCopy, T, RowMajor, kPerCopy,
      typename G::EpilogueSchedule, Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      typename G::Arch, cutlass::arch::OpClassBlockScaledTensorOp, ScaledCodes, RowMajor, kCodesPerCopy, ScaledCodes, ColumnMajor,
      kCodesPerCopy, float, typename G::MmaTile, typename G::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
      typename G::Schedule>::CollectiveOp;
  using Gemm = cutlass::gemm::kernel::GemmUniversal<ProblemShape, Mainloop, Epilogue, void>;
};

// The parameters of a kernel K that derives from its CUTLASS kernel, K::Base. A type of its own, since nvcc 13.0 spells
// the parameters of a launch out and loses the types of some constants on the way: g++ does not find them again.
template <class K>
struct ParamsOf : K::Base::Params {
  ParamsOf() = default;
  ParamsOf(const typename K::Base::Params& p) : K::Base::Params(p) {}
};

template <class G, class T>
using Gemm = typename Collective<G, T, Problem, typename EpilogueOf<G, T>::Type, cutlass::layout::RowMajor,
                                 cutlass::layout::ColumnMajor>::Gemm;

template <class T, class Tree>
void set_epilogue(Tree& tree, const Call& c) {
  tree.op_0 = {c.b_global, 0.f, {_0{}, c.b_global_per_row, _0{}}};
  tree.op_1.op_0 = {c.a_global, 0.f, {c.a_global_per_row, _0{}, _0{}}};
  tree.op_2 = {static_cast<const T*>(c.bias), T(0), {}};
}

template <class GemmKernel, class T>
typename GemmKernel::Arguments arguments(const Call& c) {
  using Mainloop = typename GemmKernel::CollectiveMainloop;
  static_assert(std::is_same_v<typename GemmKernel::StrideA, RowMajor>);
  static_assert(std::is_same_v<typename GemmKernel::StrideB, RowMajor>);
  static_assert(std::is_same_v<typename GemmKernel::StrideD, RowMajor>);
  static_assert(std::is_same_v<typename Mainloop::LayoutSFA, ScaleLayout>);
  static_assert(std::is_same_v<typename Mainloop::LayoutSFB, ScaleLayout>);
  using Code = cutlass::float_e2m1_t;
  using Scale = cutlass::float_ue4m3_t;
  typename GemmKernel::Arguments args{};
  args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  args.problem_shape = problem(c);
  args.mainloop.ptr_A = reinterpret_cast<const Code*>(c.a);
  args.mainloop.dA = a_stride(c);
  args.mainloop.ptr_B = reinterpret_cast<const Code*>(c.b);
  args.mainloop.dB = b_stride(c);
  args.mainloop.ptr_SFA = reinterpret_cast<const Scale*>(c.a_scale);
  args.mainloop.layout_SFA = a_scale_layout(c);
  args.mainloop.ptr_SFB = reinterpret_cast<const Scale*>(c.b_scale);
  args.mainloop.layout_SFB = b_scale_layout(c);
  if constexpr (is_code<T>) {
    set_epilogue<float>(args.epilogue.thread.op_0, c);
    args.epilogue.thread.op_1 = c.codes;
  } else {
    set_epilogue<T>(args.epilogue.thread, c);
  }
  args.epilogue.ptr_D = static_cast<T*>(c.y);
  args.epilogue.dD = y_stride(c);
  // sm_100 has its tiles from the hardware's scheduler and takes no such number.
  if constexpr (GemmKernel::ArchTag::kMinComputeCapability >= 120) args.hw_info.sm_count = c.sms;
  return args;
}

template <class GemmKernel>
constexpr bool fits_in_shared_memory() {
  return GemmKernel::SharedStorageSize <= (GemmKernel::ArchTag::kMinComputeCapability >= 120 ? 99 : 227) * 1024;
}

template <class GemmKernel>
const char* run(const typename GemmKernel::Arguments& args, void* workspace, cudaStream_t stream) {
  cutlass::gemm::device::GemmUniversalAdapter<GemmKernel> gemm;
  cutlass::Status status = gemm.can_implement(args);
  if (status == cutlass::Status::kSuccess) status = gemm.run(args, workspace, stream);
  return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status);
}

template <class GemmKernel, class T>
size_t workspace(const Call& c) {
  return cutlass::gemm::device::GemmUniversalAdapter<GemmKernel>::get_workspace_size(arguments<GemmKernel, T>(c));
}

template <class GemmKernel, class T>
const char* launch(const Call& c, void* workspace, cudaStream_t stream) {
  return run<GemmKernel>(arguments<GemmKernel, T>(c), workspace, stream);
}

template <class GemmKernel, class T>
Kernel kernel_of() {
  static_assert(fits_in_shared_memory<GemmKernel>());
  return {workspace<GemmKernel, T>, launch<GemmKernel, T>};
}

}  // namespace n3::nvfp4_gemm::sm1xx
