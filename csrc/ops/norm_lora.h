// layer_norm_mlae_linear: a layer norm and the low-rank linear behind it as one operator, so that the norm's
// output need not be kept for backward. Composed of other operators on every device; norm_lora_cuda.cpp runs
// the shapes of backbones fused.
#pragma once

#include "kernels/norm_lora.h"
#include "ops/dispatch.h"

namespace alore::ops {

// The call's tensors, checked. Undefined optional tensors are none.
struct NormLoraCall {
  const Tensor& x;
  OptTensor norm_weight, norm_bias;
  double eps;
  const Tensor& weight;
  OptTensor bias;
  const Tensor& lora_a;
  const Tensor& lora_b;
  const Tensor& coeff;
};

struct NormLoraOutputs {
  Tensor out, normalised, code, operand, mask, mean, rstd;
};

// What forward left, and the gradients that came; grad_normalised may be undefined.
struct NormLoraSaved {
  const Tensor& grad_out;
  Tensor grad_normalised;
  const Tensor& mean;
  const Tensor& rstd;
  const Tensor& mask;
  const Tensor& code;
  const Tensor& operand;
};

// Gradients of x, norm_weight, norm_bias, weight, bias, lora_a, lora_b, coeff.
using Grads8 = std::array<Tensor, 8>;

NormLoraOutputs compose_norm_lora(const NormLoraCall& call, double mask_p, bool training);
Grads8 compose_norm_lora_backward(const NormLoraCall& call, const NormLoraSaved& saved, Mask8 wanted);

// [..., columns] in rows as long as the padding asks for.
Tensor padded_rows(c10::SymIntArrayRef sizes, int64_t padding, const at::TensorOptions& options);
kernels::NormLoraShape norm_lora_shape(const NormLoraCall& call, int64_t num_tokens);

T7 pack(const NormLoraOutputs& o);
T8 pack(const Grads8& g);

// The operators' bodies over a backend's two functions.
template <typename Forward>
T7 layer_norm_mlae_linear(const Tensor& x, const OptTensor& norm_weight, const OptTensor& norm_bias,
                          double eps, const Tensor& weight, const OptTensor& bias, const Tensor& lora_a,
                          const Tensor& lora_b, const Tensor& coeff, double mask_p, bool training,
                          Forward forward) {
  constexpr const char* op = "layer_norm_mlae_linear";
  check_lora(op, x, weight, bias, lora_a, lora_b, coeff, Coeff::kPerExpert);
  check_layer_norm(op, x, norm_weight, norm_bias, eps, std::nullopt);
  check_mask_p(op, mask_p);
  return pack(forward(
      NormLoraCall{x, given(norm_weight), given(norm_bias), eps, weight, given(bias), lora_a, lora_b, coeff},
      mask_p, training));
}

template <typename Backward>
T8 layer_norm_mlae_linear_backward(const Tensor& grad_out, const OptTensor& grad_normalised, const Tensor& x,
                                   const OptTensor& norm_weight, const OptTensor& norm_bias, double eps,
                                   const Tensor& mean, const Tensor& rstd, const Tensor& weight,
                                   const Tensor& lora_a, const Tensor& lora_b, const Tensor& coeff,
                                   const Tensor& mask, const Tensor& code, const Tensor& operand,
                                   Mask8 wanted, Backward backward) {
  constexpr const char* op = "layer_norm_mlae_linear_backward";
  check_layer_norm(op, x, norm_weight, norm_bias, eps, std::nullopt);
  check_statistics(op, x, mean, rstd);
  check_lora_backward(op, grad_out, x, weight, lora_a, lora_b, coeff, mask, code, operand);
  const OptTensor more = given(grad_normalised);
  if (more.has_value()) check_grad(op, *more, x.sym_sizes(), x, x.scalar_type());
  return pack(backward(
      NormLoraCall{x, given(norm_weight), given(norm_bias), eps, weight, std::nullopt, lora_a, lora_b, coeff},
      NormLoraSaved{grad_out, more.value_or(Tensor()), mean, rstd, mask, code, operand}, wanted));
}

}  // namespace alore::ops
