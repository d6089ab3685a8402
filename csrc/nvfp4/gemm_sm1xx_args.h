// What CUTLASS's block-scaled collectives are told of a problem: strides of a, b and y, layouts of the block scales.
// Host functions without device code; tests/nvfp4/test_gemm_cuda_args.py compares every index with the definition's.
#pragma once
#include <cute/layout.hpp>
#include <cutlass/detail/sm100_blockscaled_layout.hpp>

#include "gemm_plan.h"

namespace n3::nvfp4_gemm::sm1xx {

using Scales = cutlass::detail::Sm1xxBlockScaledConfig<16>;
using ScaleLayout = typename Scales::LayoutSF;  // (row, k) -> byte of the row's scale at k

using Problem = cute::Shape<int, int, int, int>;                    // m, n, k, number of matrices
using RowMajor = cute::Stride<int64_t, cute::_1, int64_t>;          // of one matrix of contiguous rows
using GroupProblem = cute::Shape<int, int, int>;                    // m, n, k
using GroupRowMajor = cute::Stride<int64_t, cute::_1, cute::_0>;

inline Problem problem(const Call& c) { return {int(c.m), int(c.n), int(c.k), 1}; }

// In elements, 4-bit ones counted singly. The step between matrices is never taken: there is one.
inline RowMajor a_stride(const Call& c) { return {c.k, {}, 0}; }
inline RowMajor b_stride(const Call& c) { return {c.k, {}, 0}; }
inline RowMajor y_stride(const Call& c) { return {c.n, {}, 0}; }

inline ScaleLayout a_scale_layout(const Call& c) { return Scales::tile_atom_to_shape_SFA(problem(c)); }
inline ScaleLayout b_scale_layout(const Call& c) { return Scales::tile_atom_to_shape_SFB(problem(c)); }

}  // namespace n3::nvfp4_gemm::sm1xx
