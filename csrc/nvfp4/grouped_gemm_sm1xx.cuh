// y[i] = (a[i] b[e]^T) * a_global * b_global[e] for the rows of each expert: one launch of CUTLASS's grouped
// collectives with gemm_sm1xx.cuh's main loop. Problems, pointers, strides and scale layouts are arrays in device
// memory, written by prepare_kernel; the blocks are persistent, replace the TMA descriptors at each group and skip
// empty groups.
#pragma once
#include <cutlass/gemm/group_array_problem_shape.hpp>

#include "gemm_sm1xx.cuh"
#include "grouped_gemm_sm1xx.h"

namespace n3::nvfp4_grouped_gemm::sm1xx {

namespace base = nvfp4_gemm::sm1xx;
namespace fusion = cutlass::epilogue::fusion;
using cute::_0;
using cute::Stride;

// Both global scales have a pointer for each group: a's to one value or to one per row, b's to one value. As columns,
// read into registers, they need neither the epilogue's load warp nor shared memory.
template <class CtaTile>
using Global = fusion::Sm90ColBroadcast<0, CtaTile, float*, float, Stride<bool, _0, _0>, 1, false>;

template <class CtaTile, class T>
using Epilogue = fusion::Sm90EVT<
    base::Compute<cutlass::multiplies, T>, Global<CtaTile>,
    fusion::Sm90EVT<base::Compute<cutlass::multiplies, float>, Global<CtaTile>, fusion::Sm90AccFetch>>;

template <class G, class T>
using Gemm = typename base::Collective<G, T, cutlass::gemm::GroupProblemShape<base::GroupProblem>,
                                       Epilogue<typename G::CtaTile, T>, cutlass::layout::RowMajor*,
                                       cutlass::layout::ColumnMajor*>::Gemm;

template <class T>
T* array_of(const void* p) {
  return static_cast<T*>(const_cast<void*>(p));
}

template <class GemmKernel, class T>
typename GemmKernel::Arguments arguments(const Groups& g) {
  using Mainloop = typename GemmKernel::CollectiveMainloop;
  static_assert(std::is_same_v<typename GemmKernel::InternalStrideA, base::GroupRowMajor>);
  static_assert(std::is_same_v<typename GemmKernel::InternalStrideD, base::GroupRowMajor>);
  static_assert(std::is_same_v<typename Mainloop::InternalLayoutSFA, base::ScaleLayout>);
  static_assert(sizeof(base::GroupProblem) == sizeof(Problem) && sizeof(base::ScaleLayout) == sizeof(ScaleLayout));
  static_assert(sizeof(base::GroupRowMajor) == sizeof(int64_t));
  using Code = cutlass::float_e2m1_t;
  using Scale = cutlass::float_ue4m3_t;
  const Arrays& s = g.arrays;
  typename GemmKernel::Arguments args{};
  args.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
  args.problem_shape = {int32_t(g.experts), array_of<base::GroupProblem>(s.problems), nullptr};
  args.mainloop.ptr_A = array_of<const Code*>(s.a);
  args.mainloop.dA = array_of<base::GroupRowMajor>(s.a_stride);
  args.mainloop.ptr_B = array_of<const Code*>(s.b);
  args.mainloop.dB = array_of<base::GroupRowMajor>(s.b_stride);
  args.mainloop.ptr_SFA = array_of<const Scale*>(s.a_scale);
  args.mainloop.layout_SFA = array_of<base::ScaleLayout>(s.a_layout);
  args.mainloop.ptr_SFB = array_of<const Scale*>(s.b_scale);
  args.mainloop.layout_SFB = array_of<base::ScaleLayout>(s.b_layout);
  args.epilogue.thread.op_0 = {s.b_global, 0.f, {false, _0{}, _0{}}};
  args.epilogue.thread.op_1.op_0 = {s.a_global, 0.f, {g.call.a_global_per_row, _0{}, _0{}}};
  args.epilogue.ptr_D = array_of<T*>(s.y);
  args.epilogue.dD = array_of<base::GroupRowMajor>(s.y_stride);
  args.hw_info.sm_count = g.call.sms;
  return args;
}

template <class GemmKernel, class T>
size_t workspace(const Groups& g) {
  return cutlass::gemm::device::GemmUniversalAdapter<GemmKernel>::get_workspace_size(arguments<GemmKernel, T>(g));
}

template <class GemmKernel, class T>
const char* launch(const Groups& g, void* workspace, cudaStream_t stream) {
  return base::run<GemmKernel>(arguments<GemmKernel, T>(g), workspace, stream);
}

template <class GemmKernel, class T>
Kernel kernel_of() {
  static_assert(base::fits_in_shared_memory<GemmKernel>());
  return {workspace<GemmKernel, T>, launch<GemmKernel, T>};
}

}  // namespace n3::nvfp4_grouped_gemm::sm1xx
