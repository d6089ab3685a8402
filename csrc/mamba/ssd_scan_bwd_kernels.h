// What ssd_scan_bwd_cpu.cpp asks of each instruction set, and the arithmetic all of them keep.
//
// A chunk of up to 64 tokens of one head, a its inclusive sums of A dt, e_i = exp(a_i), f_j = exp(a_end - a_j), L_ij =
// exp(a_i - a_j) for i >= j; H the state entering, J the gradient of the state leaving; dy = grad_y silu(z):
//   R_ij = L_ij dt_j (dy_i . x_j)        W_ij = (C_i . B_j) R_ij        u_j = f_j J B_j + sum_{i >= j} (C_i . B_j) L_ij dy_i
//   dx_j = dt_j u_j + D dy_j             dC_i = e_i H^T dy_i + sum_{j <= i} R_ij B_j
//   dB_j = dt_j f_j J^T x_j + sum_{i >= j} R_ij C_i
//   r_i = C_i . (e_i H^T dy_i)           k_j = B_j . (dt_j f_j J^T x_j)
//   da_t = sum_{i >= t > j} W_ij + sum_{i >= t} r_i + sum_{j < t} k_j + e_end <J, H>
//   ddt_t = x_t . u_t + A da_t           dA = sum_t dt_t da_t           J <- e_end J + sum_i e_i dy_i C_i^T
// then ddt through the clamp and the softplus. da takes every pair of tokens that straddles t rather than differences
// of running sums, which would cancel. The heads of a group add R before its two products with B and C.
// Source: derived from the recurrence (Mamba-2, arXiv:2405.21060, sec. 6); tests compare with autograd in float64.
#pragma once
#include <cstdint>

#include "ssd_scan_bwd.h"

namespace n3::ssd_scan_bwd {

// Sums over tokens for one sequence and head, added over the sequences in their order by the caller.
struct Partial {
  double dA, ddt_bias;
  float* dD;  // [head_dim]
};

// Heads begin <= h < end, all of one group, for all tokens of one sequence.
struct Item {
  int64_t sequence, first, length;  // first: the packed token where the sequence begins, else 0
  int64_t group, begin, end;
  Operand dB, dC;     // where the sum over these heads goes: strides sequence, token, group, state dimension
  Partial* partials;  // of head `begin` and on
};

struct Kernels {
  int64_t (*scratch_floats)(const Params& p, int64_t heads, int64_t length);
  void (*run)(const Params& p, const Item& item, float* scratch);
};

extern const Kernels kGenericKernels, kAvx2Kernels, kAvx512Kernels;

}  // namespace n3::ssd_scan_bwd
