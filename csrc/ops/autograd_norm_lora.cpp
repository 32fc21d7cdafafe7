// Autograd of layer_norm_mlae_linear. Both out and normalised are differentiable: whatever else reads the
// norm's output adds its gradient there.
#include "ops/autograd.h"

namespace alore::ops {
namespace {

class LayerNormMlaeLinear : public torch::autograd::Function<LayerNormMlaeLinear> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptTensor& norm_weight,
                               const OptTensor& norm_bias, double eps, const Tensor& weight,
                               const OptTensor& bias, const Tensor& lora_a, const Tensor& lora_b,
                               const Tensor& coeff, double mask_p, bool training) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [out, normalised, code, operand, mask, mean, rstd] = layer_norm_mlae_linear_op().call(
        x, norm_weight, norm_bias, eps, weight, bias, lora_a, lora_b, coeff, mask_p, training);
    ctx->save_for_backward({x, unwrap(norm_weight), unwrap(norm_bias), mean, rstd, weight, lora_a, lora_b,
                            coeff, mask, code, operand});
    ctx->saved_data["eps"] = eps;
    ctx->saved_data["has_bias"] = unwrap(bias).defined();
    ctx->set_materialize_grads(false);  // else zeros for everything that was kept, in every backward
    ctx->mark_non_differentiable({code, operand, mask, mean, rstd});
    return {out, normalised, code, operand, mask, mean, rstd};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    if (!grad[0].defined() && !grad[1].defined()) return variable_list(11);
    const auto s = ctx->get_saved_variables();
    NeededGrads needed(ctx);
    const Mask8 wanted{needed.next(),
                       needed.next(s[1].defined()),
                       needed.next(s[2].defined()),
                       needed.next(),
                       needed.next(ctx->saved_data["has_bias"].toBool()),
                       needed.next(),
                       needed.next(),
                       needed.next()};
    Tensor grad_out = grad[0];
    if (!grad_out.defined()) {
      auto sizes = s[0].sym_sizes().vec();
      sizes.back() = s[5].sym_size(0);
      grad_out = at::zeros_symint(sizes, s[0].options());
    }
    auto [dx, dnorm_weight, dnorm_bias, dweight, dbias, da, db, dcoeff] =
        layer_norm_mlae_linear_backward_op().call(grad_out, wrap(grad[1]), s[0], wrap(s[1]), wrap(s[2]),
                                                  ctx->saved_data["eps"].toDouble(), s[3], s[4], s[5], s[6],
                                                  s[7], s[8], s[9], s[10], s[11], wanted);
    return {dx, dnorm_weight, dnorm_bias, Tensor(), dweight, dbias, da, db, dcoeff, Tensor(), Tensor()};
  }
};

T7 layer_norm_mlae_linear_autograd(const Tensor& x, const OptTensor& norm_weight, const OptTensor& norm_bias,
                                   double eps, const Tensor& weight, const OptTensor& bias,
                                   const Tensor& lora_a, const Tensor& lora_b, const Tensor& coeff,
                                   double mask_p, bool training) {
  auto o = LayerNormMlaeLinear::apply(x, norm_weight, norm_bias, eps, weight, bias, lora_a, lora_b, coeff,
                                      mask_p, training);
  return {o[0], o[1], o[2], o[3], o[4], o[5], o[6]};
}

T8 layer_norm_mlae_linear_backward_autograd(const Tensor& grad_out, const OptTensor& grad_normalised,
                                            const Tensor& x, const OptTensor& norm_weight,
                                            const OptTensor& norm_bias, double eps, const Tensor& mean,
                                            const Tensor& rstd, const Tensor& weight, const Tensor& lora_a,
                                            const Tensor& lora_b, const Tensor& coeff, const Tensor& mask,
                                            const Tensor& code, const Tensor& operand, Mask8 wanted) {
  return once_differentiable(
      "layer_norm_mlae_linear",
      [&] {
        return layer_norm_mlae_linear_backward_op().call(grad_out, grad_normalised, x, norm_weight, norm_bias,
                                                         eps, mean, rstd, weight, lora_a, lora_b, coeff, mask,
                                                         code, operand, wanted);
      },
      grad_out, grad_normalised, x, norm_weight, norm_bias, weight, lora_a, lora_b, coeff);
}

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, Autograd, m) {
  m.impl("layer_norm_mlae_linear", alore::ops::layer_norm_mlae_linear_autograd);
  m.impl("layer_norm_mlae_linear_backward", alore::ops::layer_norm_mlae_linear_backward_autograd);
}
