// Tiles of nvfp4_gemm on sm_100. K goes in steps of 256: 128 bytes of codes of a row, one swizzled line.
//   Small  128 x 64 by one SM: few tokens are bound by memory, and narrow tiles give more SMs some weights to read
//   Large  256 x 256 by a pair of SMs, each with half of the rows of a and of b. The epilogue takes 64 columns at a
//          time: more of them spill with three broadcast operands
#pragma once
#include "gemm_sm1xx.cuh"

namespace n3::nvfp4_gemm::sm100 {

using namespace cute;

struct Small {
  using Arch = cutlass::arch::Sm100;
  using MmaTile = Shape<_128, _64, _256>;
  using CtaTile = MmaTile;
  using Cluster = Shape<_1, _1, _1>;
  using EpilogueTile = cutlass::epilogue::collective::EpilogueTileAuto;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecialized1SmNvf4Sm100;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized1Sm;
  using CodesNode = sm1xx::CodesOfRows;
};

struct Large {
  using Arch = cutlass::arch::Sm100;
  using MmaTile = Shape<_256, _256, _256>;
  using CtaTile = Shape<_128, _256, _256>;
  using Cluster = Shape<_2, _1, _1>;
  using EpilogueTile = Shape<_128, _64>;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecialized2SmNvf4Sm100;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized2Sm;
  using CodesNode = sm1xx::CodesOfRows;
};

// A short name of its own; scripts/compile_cuda.py looks for the instructions of *_sm100.
template <class G, class T>
struct tensor_gemm_sm100 : sm1xx::Gemm<G, T> {
  using Base = sm1xx::Gemm<G, T>;
  using Params = sm1xx::ParamsOf<tensor_gemm_sm100>;
};

template <Out kOut>
Kernel kernel(Tile tile) {
  using T = sm1xx::Element<kOut>;
  if (tile == Tile::kSmall) return sm1xx::kernel_of<tensor_gemm_sm100<Small, T>, T>();
  return sm1xx::kernel_of<tensor_gemm_sm100<Large, T>, T>();
}

}  // namespace n3::nvfp4_gemm::sm100
