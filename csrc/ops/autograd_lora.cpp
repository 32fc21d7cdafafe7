// Autograd of masked_lora_linear.
#include "ops/autograd.h"

namespace alore::ops {
namespace {

class MaskedLoraLinear : public torch::autograd::Function<MaskedLoraLinear> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const OptTensor& bias,
                        const Tensor& lora_a, const Tensor& lora_b, const Tensor& coeff) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, weight, lora_a, lora_b, coeff});
    ctx->saved_data["has_bias"] = bias.has_value() && bias->defined();
    return masked_lora_linear_op().call(x, weight, bias, lora_a, lora_b, coeff);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    if (!grad[0].defined()) return variable_list(6);
    const auto saved = ctx->get_saved_variables();
    NeededGrads needed(ctx);
    const Mask6 mask{needed.next(), needed.next(), needed.next(ctx->saved_data["has_bias"].toBool()),
                     needed.next(), needed.next(), needed.next()};
    auto [dx, dweight, dbias, da, db, dcoeff] = masked_lora_linear_backward_op().call(
        grad[0], saved[0], saved[1], saved[2], saved[3], saved[4], mask);
    return {dx, dweight, dbias, da, db, dcoeff};
  }
};

Tensor masked_lora_linear_autograd(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                   const Tensor& lora_a, const Tensor& lora_b, const Tensor& coeff) {
  return MaskedLoraLinear::apply(x, weight, bias, lora_a, lora_b, coeff);
}

T6 masked_lora_linear_backward_autograd(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                        const Tensor& lora_a, const Tensor& lora_b, const Tensor& coeff,
                                        Mask6 mask) {
  return once_differentiable(
      "masked_lora_linear",
      [&] { return masked_lora_linear_backward_op().call(grad_out, x, weight, lora_a, lora_b, coeff, mask); },
      grad_out, x, weight, lora_a, lora_b, coeff);
}

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, Autograd, m) {
  using namespace alore::ops;
  m.impl("masked_lora_linear", masked_lora_linear_autograd);
  m.impl("masked_lora_linear_backward", masked_lora_linear_backward_autograd);
}
