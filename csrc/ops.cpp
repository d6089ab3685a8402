// The one list of operators. Kernels register themselves at the foot of their own file; the references, fake
// kernels and autograd formulas register from n3kernels/<family>/<op>.py.
//
// Conventions: scales are decode scales (multiply to get the value back); tensors that are written carry an alias
// annotation; tensors that autograd may see are positional; random operators take their seed as a tensor, so that a
// CUDA graph can replay them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(n3, m) {
  // ---- nvfp4: e2m1 codes, one e4m3 scale per 16 elements along the last dimension, one fp32 global scale
  m.def(
      "nvfp4_quantize(Tensor x, Tensor? global_scale=None, Tensor? hadamard=None, Tensor? seed=None, *, "
      "str rounding='nearest', bool four_over_six=False, str metric='mae', str block='1x16', bool per_row=False, "
      "str scale_layout='linear') -> (Tensor q, Tensor block_scale, Tensor global_scale)");
  m.def(
      "relu2_nvfp4_quantize(Tensor x, Tensor? global_scale=None, *, bool four_over_six=False, str metric='mae', "
      "bool per_row=False, str scale_layout='linear') -> (Tensor q, Tensor block_scale, Tensor global_scale)");
  m.def(
      "silu_mul_nvfp4_quantize(Tensor x, Tensor? global_scale=None, *, bool four_over_six=False, str metric='mae', "
      "bool per_row=False, str scale_layout='linear') -> (Tensor q, Tensor block_scale, Tensor global_scale)");
  m.def(
      "rms_norm_nvfp4_quantize(Tensor x, Tensor weight, Tensor? residual=None, Tensor? global_scale=None, *, "
      "float eps=1e-5, bool four_over_six=False, str metric='mae', bool per_row=False, str scale_layout='linear', "
      "bool keep=False) -> (Tensor q, Tensor block_scale, Tensor global_scale, Tensor y, Tensor residual_out)");
  m.def(
      "nvfp4_fake_quantize(Tensor x, Tensor? global_scale=None, Tensor? seed=None, str rounding='nearest', "
      "bool four_over_six=False, str metric='mae', str block='1x16', bool per_row=False) -> Tensor");
  m.def(
      "nvfp4_dequantize(Tensor q, Tensor block_scale, Tensor global_scale, *, ScalarType dtype, "
      "str scale_layout='linear') -> Tensor");
  m.def(
      "nvfp4_linear(Tensor x, Tensor q, Tensor block_scale, Tensor global_scale, Tensor? bias=None, "
      "str? activation=None) -> Tensor");
  m.def("nvfp4_repack(Tensor q, Tensor block_scale) -> Tensor");  // a blob for the kernels of sm_90a
  m.def(
      "nvfp4_linear.packed(Tensor x, Tensor blob, Tensor global_scale, int n, Tensor? bias=None, "
      "str? activation=None) -> Tensor");
  m.def(
      "nvfp4_linear_fp8(Tensor x, Tensor q, Tensor block_scale, Tensor global_scale, Tensor? bias=None, "
      "str? activation=None) -> Tensor");
  m.def(
      "nvfp4_gemm(Tensor a, Tensor a_scale, Tensor a_global, Tensor b, Tensor b_scale, Tensor b_global, "
      "Tensor? bias=None, *, ScalarType out_dtype, str a_layout='linear', str b_layout='linear') -> Tensor");
  m.def(
      "nvfp4_gemm.quantized(Tensor a, Tensor a_scale, Tensor a_global, Tensor b, Tensor b_scale, Tensor b_global, "
      "Tensor global_scale, Tensor? bias=None, str? activation=None, *, str a_layout='linear', "
      "str b_layout='linear', str scale_layout='linear') -> (Tensor q, Tensor block_scale)");
  m.def(
      "nvfp4_grouped_gemm(Tensor a, Tensor a_scale, Tensor a_global, Tensor b, Tensor b_scale, Tensor b_global, "
      "Tensor offsets, *, ScalarType out_dtype, str b_layout='linear') -> Tensor");
  m.def(
      "nvfp4_embedding(Tensor ids, Tensor q, Tensor block_scale, Tensor global_scale, *, ScalarType dtype) "
      "-> Tensor");
  m.def("nvfp4_swizzle_scale(Tensor block_scale) -> Tensor");
  m.def("nvfp4_unswizzle_scale(Tensor block_scale, int rows, int cols) -> Tensor");

  // ---- mamba: the Mamba-2 mixer between in_proj and out_proj
  m.def(
      "causal_conv1d(Tensor x, Tensor weight, Tensor? bias=None, Tensor? initial_state=None, "
      "Tensor? cu_seqlens=None, *, str? activation=None) -> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv1d.slots(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) conv_state, Tensor state_indices, "
      "Tensor? has_initial=None, Tensor? cu_seqlens=None, Tensor? checkpoint_tokens=None, "
      "Tensor? checkpoint_indices=None, *, str? activation=None) -> Tensor");
  m.def(
      "causal_conv1d_bwd(Tensor grad_y, Tensor? grad_final_state, Tensor x, Tensor weight, Tensor? bias, "
      "Tensor? initial_state, Tensor? cu_seqlens, str? activation) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias=None, "
      "Tensor? state_indices=None, Tensor? dst_state_indices=None, *, Tensor? num_accepted=None, "
      "Tensor? num_tokens=None, Tensor? parents=None, Tensor? cache_seqlens=None, str? activation=None) -> Tensor");
  m.def(
      "ssd_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, "
      "Tensor? dt_bias=None, Tensor? initial_states=None, Tensor? cu_seqlens=None, *, int chunk_size=128, "
      "bool dt_softplus=True, float dt_min=0.0, float? dt_max=None) -> (Tensor y, Tensor final_states)");
  m.def(
      "ssd_scan.slots(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
      "Tensor(a!) state, Tensor state_indices, Tensor? has_initial=None, Tensor? cu_seqlens=None, "
      "Tensor? checkpoint_tokens=None, Tensor? checkpoint_indices=None, *, int chunk_size=128, "
      "bool dt_softplus=True, float dt_min=0.0, float? dt_max=None) -> Tensor");
  m.def(
      "ssd_scan_bwd(Tensor grad_y, Tensor? grad_final_states, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
      "Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_states, Tensor? cu_seqlens, int chunk_size, "
      "bool dt_softplus, float dt_min, float? dt_max) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "ssm_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, "
      "Tensor? z=None, Tensor? dt_bias=None, Tensor? state_indices=None, Tensor? dst_state_indices=None, *, "
      "Tensor? num_accepted=None, Tensor? num_tokens=None, Tensor? parents=None, Tensor(b!)? state_scale=None, "
      "Tensor? seed=None, str rounding='nearest', bool dt_softplus=True, float dt_min=0.0, float? dt_max=None) "
      "-> Tensor");
  m.def(
      "ssm_replay_update(Tensor(a!) state, Tensor(b!) ring_x, Tensor(c!) ring_B, Tensor(d!) ring_dt, "
      "Tensor ring_pos, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D=None, Tensor? z=None, "
      "Tensor? dt_bias=None, Tensor? state_indices=None, *, Tensor? parents=None, bool dt_softplus=True, "
      "float dt_min=0.0, float? dt_max=None) -> Tensor");
  m.def(
      "ssm_replay_commit(Tensor(a!) ring_pos, Tensor(b!) ring_x, Tensor(c!) ring_B, Tensor(d!) ring_dt, "
      "Tensor num_accepted, int tokens, Tensor? path=None, Tensor? state_indices=None) -> ()");
  m.def(
      "ssm_replay_flush(Tensor(a!) state, Tensor(b!) ring_pos, Tensor ring_x, Tensor ring_B, Tensor ring_dt, "
      "Tensor A, Tensor? state_indices=None) -> ()");
  m.def(
      "gated_rms_norm(Tensor x, Tensor? z, Tensor weight, int group_size, float eps=1e-5, "
      "bool norm_before_gate=False) -> Tensor");
  m.def(
      "gated_rms_norm_bwd(Tensor grad_y, Tensor x, Tensor? z, Tensor weight, int group_size, float eps, "
      "bool norm_before_gate) -> (Tensor, Tensor, Tensor)");
  m.def(
      "mamba2_prefill(Tensor zxbcdt, Tensor conv_weight, Tensor? conv_bias, Tensor(a!) conv_state, "
      "Tensor(b!) ssm_state, Tensor state_indices, Tensor A, Tensor? D, Tensor? dt_bias, Tensor? norm_weight, "
      "Tensor? has_initial=None, Tensor? cu_seqlens=None, Tensor? checkpoint_tokens=None, "
      "Tensor? checkpoint_indices=None, *, int? group_size=None, float eps=1e-5, bool norm_before_gate=False, "
      "str? activation='silu', int chunk_size=128, bool dt_softplus=True, float dt_min=0.0, float? dt_max=None) "
      "-> Tensor");
  m.def(
      "mamba2_decode(Tensor zxbcdt, Tensor conv_weight, Tensor? conv_bias, Tensor(a!) conv_state, "
      "Tensor(b!) ssm_state, Tensor A, Tensor? D, Tensor? dt_bias, Tensor? norm_weight, "
      "Tensor? state_indices=None, Tensor? dst_state_indices=None, *, Tensor? num_accepted=None, "
      "Tensor? num_tokens=None, Tensor? parents=None, Tensor(c!)? state_scale=None, Tensor? seed=None, "
      "str rounding='nearest', int? group_size=None, float eps=1e-5, bool norm_before_gate=False, "
      "str? activation='silu', bool dt_softplus=True, float dt_min=0.0, float? dt_max=None) -> Tensor");

  // ---- moe: routing, grouped experts, the LatentMoE layer
  m.def(
      "moe_route(Tensor logits, Tensor? bias=None, Tensor? expert_map=None, *, int top_k, int n_group=1, "
      "int topk_group=1, str score='sigmoid', bool normalize=True, float scale=1.0) "
      "-> (Tensor ids, Tensor weights, Tensor counts, Tensor flags)");
  m.def(
      "moe_route_bwd(Tensor grad_weights, Tensor logits, Tensor ids, *, str score='sigmoid', bool normalize=True, "
      "float scale=1.0) -> Tensor");
  m.def(
      "moe_sort(Tensor ids, int num_experts, int first_expert=0) "
      "-> (Tensor order, Tensor offsets, Tensor active, Tensor num_active)");
  m.def(
      "moe_experts(Tensor x, Tensor w_up, Tensor w_down, Tensor ids, Tensor weights, Tensor? up_scale=None, "
      "Tensor? up_global=None, Tensor? down_scale=None, Tensor? down_global=None, Tensor? valid_tokens=None, *, "
      "str activation='relu2', int first_expert=0, ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "moe_experts_bwd(Tensor grad_y, Tensor x, Tensor w_up, Tensor w_down, Tensor ids, Tensor weights, "
      "str activation, int first_expert) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "grouped_linear(Tensor x, Tensor w, Tensor offsets, Tensor? gather=None, Tensor? row_scale=None, "
      "Tensor? block_scale=None, Tensor? global_scale=None, *, str? activation=None) -> Tensor");
  m.def(
      "grouped_linear_bwd(Tensor grad_y, Tensor x, Tensor w, Tensor offsets, Tensor? gather, Tensor? row_scale, "
      "str? activation) -> (Tensor, Tensor, Tensor)");
  m.def(
      "latent_moe(Tensor x, Tensor router_weight, Tensor? router_bias, Tensor w_up, Tensor w_down, "
      "Tensor shared_up, Tensor shared_down, Tensor? fc1=None, Tensor? fc2=None, Tensor? latent_norm=None, "
      "Tensor? up_scale=None, Tensor? up_global=None, Tensor? down_scale=None, Tensor? down_global=None, "
      "Tensor? shared_up_scale=None, Tensor? shared_up_global=None, Tensor? shared_down_scale=None, "
      "Tensor? shared_down_global=None, *, int top_k, int n_group=1, int topk_group=1, bool normalize=True, "
      "float scale=1.0, str activation='relu2', float norm_eps=1e-5) -> Tensor");
  m.def(
      "latent_moe_front(Tensor x, Tensor router_weight, Tensor? fc1, Tensor shared_up, *, str activation='relu2') "
      "-> (Tensor logits, Tensor z, Tensor shared)");
  m.def(
      "latent_moe_tail(Tensor y, Tensor? fc2, Tensor shared, Tensor shared_down, Tensor? residual=None) -> Tensor");

  // ---- mtp: sampling, draft verification, thinking budget
  m.def(
      "sample(Tensor logits, Tensor seed, Tensor pos, *, Tensor? slot=None, Tensor? temperature=None, "
      "Tensor? top_k=None, Tensor? top_p=None, Tensor? min_p=None, Tensor? bitmask=None, "
      "Tensor? bitmask_row=None, Tensor? forced_token=None, Tensor? bias_ids=None, Tensor? bias_val=None, "
      "Tensor? bias_cu=None) -> (Tensor tokens, Tensor logprobs, Tensor flags)");
  m.def(
      "mtp_verify(Tensor logits, Tensor draft_tokens, Tensor cu_rows, Tensor seed, Tensor pos, *, "
      "str mode='greedy', int max_drafts, Tensor? slot=None, Tensor? temperature=None, Tensor? top_k=None, "
      "Tensor? top_p=None, Tensor? min_p=None, Tensor? bitmask=None, Tensor? bitmask_row=None, "
      "Tensor? forced_token=None, Tensor? bias_ids=None, Tensor? bias_val=None, Tensor? bias_cu=None, "
      "Tensor? eos_ids=None, Tensor? draft_ids=None, Tensor? draft_probs=None, Tensor? draft_logits=None, "
      "Tensor? draft_temperature=None, Tensor? draft_vocab=None, bool allow_lossy=False, int relaxed_top_k=1, "
      "float relaxed_delta=0.0, float typical_epsilon=0.3, float typical_delta=0.09, Tensor? uniforms=None) "
      "-> (Tensor tokens, Tensor num_emitted, Tensor last_row, Tensor logprobs, Tensor flags)");
  m.def(
      "mtp_verify_tree(Tensor logits, Tensor node_tokens, Tensor parents, Tensor cu_rows, Tensor seed, Tensor pos, *, "
      "str mode='greedy', int max_depth, Tensor? slot=None, Tensor? temperature=None, Tensor? top_k=None, "
      "Tensor? top_p=None, Tensor? min_p=None, Tensor? bitmask=None, Tensor? bitmask_row=None, "
      "Tensor? forced_token=None, Tensor? bias_ids=None, Tensor? bias_val=None, Tensor? bias_cu=None, "
      "Tensor? eos_ids=None, Tensor? draft_ids=None, Tensor? draft_probs=None, Tensor? draft_vocab=None, "
      "Tensor? uniforms=None) "
      "-> (Tensor tokens, Tensor num_emitted, Tensor rows, Tensor logprobs, Tensor flags)");
  m.def(
      "mtp_draft_sample(Tensor logits, Tensor seed, Tensor pos, *, int max_ids, Tensor? slot=None, "
      "Tensor? temperature=None, Tensor? draft_vocab=None) -> (Tensor tokens, Tensor ids, Tensor probs)");
  m.def(
      "mtp_commit(Tensor tokens, Tensor num_emitted, Tensor cu_rows, Tensor(a!) seq_len, *, Tensor? slot=None, "
      "Tensor? eos_ids=None, Tensor? max_len=None, Tensor(b!)? finished=None, Tensor(c!)? histogram=None, "
      "Tensor(d!)? ring_pos=None, int ring_size=0, int ring_tokens=0) "
      "-> (Tensor num_accepted, Tensor last_token, Tensor last_row, Tensor kv_start, Tensor kv_free, "
      "Tensor flat_tokens, Tensor cu_emitted)");
  m.def(
      "thinking_budget(Tensor draft_tokens, Tensor cu_rows, Tensor committed_tail, Tensor num_output, "
      "Tensor active, Tensor budget, Tensor grace, Tensor end_ids, Tensor end_think_ids, "
      "Tensor newline_bitmask) -> Tensor forced_token");
}
