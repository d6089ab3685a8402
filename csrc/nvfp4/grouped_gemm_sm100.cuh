// The tile of nvfp4_grouped_gemm on sm_100: 128 x 128 by one SM, K in steps of 256. An expert of a few hundred rows or
// less has no use for larger ones.
#pragma once
#include "gemm_sm1xx.cuh"
#include "grouped_gemm_sm1xx.cuh"

namespace n3::nvfp4_grouped_gemm::sm100 {

using namespace cute;

struct Tile {
  using Arch = cutlass::arch::Sm100;
  using MmaTile = Shape<_128, _128, _256>;
  using CtaTile = MmaTile;
  using Cluster = Shape<_1, _1, _1>;
  using EpilogueTile = Shape<_128, _64>;
  using Schedule = cutlass::gemm::KernelPtrArrayTmaWarpSpecialized1SmNvf4Sm100;
  using EpilogueSchedule = cutlass::epilogue::PtrArrayTmaWarpSpecialized1Sm;
};

template <class T>
struct tensor_grouped_gemm_sm100 : sm1xx::Gemm<Tile, T> {
  using Base = sm1xx::Gemm<Tile, T>;
  using Params = nvfp4_gemm::sm1xx::ParamsOf<tensor_grouped_gemm_sm100>;
};

template <Out kOut>
Kernel kernel() {
  using T = nvfp4_gemm::sm1xx::Element<kOut>;
  return sm1xx::kernel_of<tensor_grouped_gemm_sm100<T>, T>();
}

}  // namespace n3::nvfp4_grouped_gemm::sm100
