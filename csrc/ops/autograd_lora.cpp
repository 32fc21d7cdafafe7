// Autograd of masked_lora_linear and mlae_linear.
#include "ops/autograd.h"

namespace alore::ops {
namespace {

// What both functions' backward is: gradients of x, weight, bias, lora_a, lora_b and coeff.
variable_list lora_gradients(AutogradContext* ctx, const Tensor& grad_out) {
  const auto s = ctx->get_saved_variables();
  NeededGrads needed(ctx);
  const Mask6 wanted{needed.next(), needed.next(), needed.next(ctx->saved_data["has_bias"].toBool()),
                     needed.next(), needed.next(), needed.next()};
  auto [dx, dweight, dbias, da, db, dcoeff] = masked_lora_linear_backward_op().call(
      grad_out, s[0], s[1], s[2], s[3], s[4], wrap(s[5]), s[6], s[7], wanted);
  return {dx, dweight, dbias, da, db, dcoeff};
}

bool is_given(const OptTensor& t) { return t.has_value() && t->defined(); }

class MaskedLoraLinear : public torch::autograd::Function<MaskedLoraLinear> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const OptTensor& bias, const Tensor& lora_a, const Tensor& lora_b,
                               const Tensor& coeff) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, code, operand] = masked_lora_linear_op().call(x, weight, bias, lora_a, lora_b, coeff);
    ctx->save_for_backward({x, weight, lora_a, lora_b, coeff, Tensor(), code, operand});
    ctx->saved_data["has_bias"] = is_given(bias);
    ctx->set_materialize_grads(false);  // else zeros for code and operand, in every backward
    ctx->mark_non_differentiable({code, operand});
    return {y, code, operand};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    return grad[0].defined() ? lora_gradients(ctx, grad[0]) : variable_list(6);
  }
};

class MlaeLinear : public torch::autograd::Function<MlaeLinear> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const OptTensor& bias, const Tensor& lora_a, const Tensor& lora_b,
                               const Tensor& coeff, double mask_p, bool training) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, code, operand, mask] =
        mlae_linear_op().call(x, weight, bias, lora_a, lora_b, coeff, mask_p, training);
    ctx->save_for_backward({x, weight, lora_a, lora_b, coeff, mask, code, operand});
    ctx->saved_data["has_bias"] = is_given(bias);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({code, operand, mask});
    return {y, code, operand, mask};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    if (!grad[0].defined()) return variable_list(8);
    variable_list grads = lora_gradients(ctx, grad[0]);
    grads.resize(8);  // mask_p and training have none
    return grads;
  }
};

T3 masked_lora_linear_autograd(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                               const Tensor& lora_a, const Tensor& lora_b, const Tensor& coeff) {
  auto out = MaskedLoraLinear::apply(x, weight, bias, lora_a, lora_b, coeff);
  return {out[0], out[1], out[2]};
}

T4 mlae_linear_autograd(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& lora_a,
                        const Tensor& lora_b, const Tensor& coeff, double mask_p, bool training) {
  auto out = MlaeLinear::apply(x, weight, bias, lora_a, lora_b, coeff, mask_p, training);
  return {out[0], out[1], out[2], out[3]};
}

T6 masked_lora_linear_backward_autograd(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                        const Tensor& lora_a, const Tensor& lora_b, const Tensor& coeff,
                                        const OptTensor& mask, const Tensor& code, const Tensor& operand,
                                        Mask6 wanted) {
  return once_differentiable(
      is_given(mask) ? "mlae_linear" : "masked_lora_linear",
      [&] {
        return masked_lora_linear_backward_op().call(grad_out, x, weight, lora_a, lora_b, coeff, mask, code,
                                                     operand, wanted);
      },
      grad_out, x, weight, lora_a, lora_b, coeff);
}

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, Autograd, m) {
  using namespace alore::ops;
  m.impl("masked_lora_linear", masked_lora_linear_autograd);
  m.impl("mlae_linear", mlae_linear_autograd);
  m.impl("masked_lora_linear_backward", masked_lora_linear_backward_autograd);
}
