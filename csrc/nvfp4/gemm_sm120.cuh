// The tile of nvfp4_gemm on sm_120: 128 x 128, K in steps of 128, by two groups of four warps that share it; 99 KiB of
// shared memory hold 4 stages. Blocks of scales have 128 rows, so no side may be smaller; 256 x 128 spills with three
// broadcast operands, whatever the epilogue's tile (152 bytes and more per thread, nvcc 13.0).
#pragma once
#include "gemm_sm1xx.cuh"

namespace n3::nvfp4_gemm::sm120 {

using namespace cute;

struct Square {
  using Arch = cutlass::arch::Sm120;
  using MmaTile = Shape<_128, _128, _128>;
  using CtaTile = MmaTile;
  using Cluster = Shape<_1, _1, _1>;
  using EpilogueTile = cutlass::epilogue::collective::EpilogueTileAuto;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
  using CodesNode = sm1xx::CodesOfQuads;
};

// A short name of its own; scripts/compile_cuda.py looks for the instructions of *_sm120.
template <class T>
struct tensor_gemm_sm120 : sm1xx::Gemm<Square, T> {
  using Base = sm1xx::Gemm<Square, T>;
  using Params = sm1xx::ParamsOf<tensor_gemm_sm120>;
};

template <Out kOut>
Kernel kernel() {
  using T = sm1xx::Element<kOut>;
  return sm1xx::kernel_of<tensor_gemm_sm120<T>, T>();
}

}  // namespace n3::nvfp4_gemm::sm120
