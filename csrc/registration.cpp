// The operators of the library: each fills the tensors marked (a!) that its caller made, for the
// operator of the same name in Python.
#include "library.h"

TIM_DEFINE(library) {
  library.def(
      "ada_layer_norm_forward(Tensor x, Tensor? branch, Tensor? gate, Tensor? bias, Tensor? shift, "
      "Tensor? scale, Tensor? weight, Tensor? norm_bias, Tensor(a!)? out, Tensor(b!)? y, "
      "float eps, bool is_rms, Tensor? cu_seqlens, int max_length, int tokens_per_block) -> ()");
  library.def(
      "ada_layer_norm_backward(Tensor? dout, Tensor? dy, Tensor x, Tensor? branch, Tensor? gate, "
      "Tensor? bias, Tensor? scale, Tensor? weight, Tensor? norm_bias, Tensor(a!) dx, "
      "Tensor(b!)? dbranch, Tensor(c!)? dgate, Tensor(d!)? dscale, Tensor(e!) partial, float eps, "
      "bool is_rms, Tensor? cu_seqlens, int max_length, int tokens_per_block) -> ()");

  library.def("swiglu_forward(Tensor gate, Tensor value, Tensor(a!) out) -> ()");
  library.def(
      "swiglu_backward(Tensor dout, Tensor gate, Tensor value, Tensor(a!) dgate, "
      "Tensor(b!) dvalue) -> ()");
  library.def(
      "swiglu_summed_backward(Tensor dout, Tensor gate, Tensor value, Tensor(a!) dgate, "
      "Tensor(b!) dvalue, Tensor(c!) partial, int tokens_per_block) -> ()");

  library.def(
      "qk_norm_rope_forward(Tensor q, Tensor? k, Tensor? q_weight, Tensor? q_bias, "
      "Tensor? k_weight, Tensor? k_bias, Tensor? q_shift, Tensor? k_shift, Tensor? positions, "
      "int period, Tensor? periods, Tensor? freq, Tensor(a!) q_out, Tensor(b!)? k_out, "
      "float eps, Tensor? cu_seqlens, int max_length, int tokens_per_block, int heads, "
      "int slots) -> ()");
  library.def(
      "qk_norm_rope_backward(Tensor? dq_out, Tensor? dk_out, Tensor q, Tensor? k, "
      "Tensor? q_weight, Tensor? k_weight, Tensor? q_shift, Tensor? k_shift, Tensor? positions, "
      "int period, Tensor? periods, Tensor? freq, Tensor(a!)? dq, Tensor(b!)? dk, "
      "Tensor(c!)? shifts, Tensor(d!)? affine, float eps, Tensor? cu_seqlens, int max_length, "
      "int tokens_per_block, int heads, int slots) -> ()");

  library.def(
      "transition_inputs_forward(Tensor x, Tensor z, Tensor alpha, Tensor sigma, Tensor? d_alpha, "
      "Tensor? d_sigma, Tensor? alpha_pm, Tensor? sigma_pm, Tensor(a!) x_t, Tensor(b!)? v_t, "
      "Tensor(c!)? x_pm) -> ()");
  library.def(
      "transition_inputs_backward(Tensor? dx_t, Tensor? dv_t, Tensor? dx_pm, Tensor x, Tensor z, "
      "Tensor alpha, Tensor sigma, Tensor? d_alpha, Tensor? d_sigma, Tensor? alpha_pm, "
      "Tensor? sigma_pm, Tensor(a!)? dx, Tensor(b!)? dz, Tensor(c!)? partial) -> ()");

  library.def(
      "transition_loss_forward(Tensor prediction, Tensor x, Tensor z, Tensor a_x, Tensor a_z, "
      "Tensor a_D, Tensor a_cond, Tensor a_uncond, Tensor? later, Tensor? earlier, float rate, "
      "Tensor? F_cond, Tensor? F_uncond, Tensor(a!) partial, int channels, int positions) -> ()");
  library.def(
      "transition_loss_backward(Tensor? d_squared, Tensor? d_cosine, Tensor prediction, Tensor x, "
      "Tensor z, Tensor a_x, Tensor a_z, Tensor a_D, Tensor a_cond, Tensor a_uncond, "
      "Tensor? later, Tensor? earlier, float rate, Tensor? F_cond, Tensor? F_uncond, "
      "Tensor(a!) dprediction, int channels) -> ()");

  library.def(
      "transition_step_forward(Tensor x, Tensor F_cond, Tensor? F_uncond, Tensor? noise, "
      "Tensor? guidance, Tensor a, Tensor b, Tensor? c, Tensor(a!) out) -> ()");
  library.def(
      "transition_step_backward(Tensor d, Tensor x, Tensor F_cond, Tensor? F_uncond, "
      "Tensor? noise, Tensor? guidance, Tensor a, Tensor b, Tensor? c, Tensor(a!)? dx, "
      "Tensor(b!)? dF_cond, Tensor(c!)? dF_uncond, Tensor(d!)? dnoise, Tensor(e!)? partial) "
      "-> ()");

  library.def("time_pair_embedding_forward(Tensor t, Tensor r, int codes, Tensor(a!) out) -> ()");
  library.def(
      "time_pair_embedding_backward(Tensor dout, Tensor t, Tensor r, int codes, Tensor(a!) dt, "
      "Tensor(b!) dr) -> ()");
}
