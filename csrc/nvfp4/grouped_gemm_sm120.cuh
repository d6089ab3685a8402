// The tile of nvfp4_grouped_gemm on sm_120: 128 x 128, K in steps of 128. An expert of a few hundred rows or less has
// no use for larger ones. Included before anything of CUTLASS, because of the macro.
#pragma once
// Registers stay where they are: of the 40 that setmaxnreg would leave the load warps, the descriptors of four tensors
// spill 17 (nvcc 13.0), and the 168 that everybody has at launch hold the tile.
#define CUDA_CTA_RECONFIG_ACTIVATED 0
#include "gemm_sm1xx.cuh"
#include "grouped_gemm_sm1xx.cuh"

namespace n3::nvfp4_grouped_gemm::sm120 {

using namespace cute;

struct Tile {
  using Arch = cutlass::arch::Sm120;
  using MmaTile = Shape<_128, _128, _128>;
  using CtaTile = MmaTile;
  using Cluster = Shape<_1, _1, _1>;
  using EpilogueTile = cutlass::epilogue::collective::EpilogueTileAuto;
  using Schedule = cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative;
  using EpilogueSchedule = cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative;
};

template <class T>
struct tensor_grouped_gemm_sm120 : sm1xx::Gemm<Tile, T> {
  using Base = sm1xx::Gemm<Tile, T>;
  using Params = nvfp4_gemm::sm1xx::ParamsOf<tensor_grouped_gemm_sm120>;
};

template <Out kOut>
Kernel kernel() {
  using T = nvfp4_gemm::sm1xx::Element<kOut>;
  return sm1xx::kernel_of<tensor_grouped_gemm_sm120<T>, T>();
}

}  // namespace n3::nvfp4_grouped_gemm::sm120
