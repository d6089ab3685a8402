// ssd_scan_bwd: the gradients of ssd_scan in x, dt, A, B, C, D, z, dt_bias and the initial states.
#pragma once
#include "ssd_scan.h"

namespace n3::ssd_scan_bwd {

using mamba::Operand;
using mamba::OptionalTensor;

constexpr const char* op = "ssd_scan_bwd";

// Gradients are contiguous and laid out as what they belong to; null where that was not given.
struct Params {
  ssd_scan::Params forward;
  Operand grad_y;      // strides: sequence, token, head, channel
  Operand grad_final;  // sequence, head, channel, state dimension; null: zeros
  Operand dx, ddt, dB, dC, dz;
  Operand dA, dD, ddt_bias, dinitial;
};

// Checks one call; the gradients are left to the launcher.
inline Params check(const Tensor& grad_y, const OptionalTensor& grad_final_states, const Tensor& x, const Tensor& dt,
                    const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
                    const OptionalTensor& z, const OptionalTensor& dt_bias, const OptionalTensor& initial_states,
                    const OptionalTensor& cu_seqlens, int64_t chunk_size, bool dt_softplus, double dt_min,
                    std::optional<double> dt_max) {
  Params p{};
  p.forward = ssd_scan::check(x, dt, A, B, C, D, z, dt_bias, initial_states, cu_seqlens, chunk_size, dt_softplus,
                              dt_min, dt_max);
  const ssd_scan::Params& f = p.forward;
  N3_CHECK(op, shape_str(grad_y) == shape_str(x), "grad_y must have shape ", shape_str(x), ", got ", shape_str(grad_y));
  check_floating(op, "grad_y", grad_y.scalar_type());
  if (grad_final_states) {
    check_shape(op, "grad_final_states", *grad_final_states, {f.sequences, f.heads, f.head_dim, f.d_state});
    check_floating(op, "grad_final_states", grad_final_states->scalar_type());
  }
  check_same_device(op, "grad_y", grad_y, "x", x);
  mamba::check_on_device(op, "grad_final_states", grad_final_states, x);
  p.grad_y = ssd_scan::tokens_operand(grad_y, cu_seqlens.has_value());
  p.grad_final = mamba::operand_of(grad_final_states);
  return p;
}

}  // namespace n3::ssd_scan_bwd
