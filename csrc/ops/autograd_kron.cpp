// Autograd of kron_linear, alore and layer_norm_alore. Each saves its inputs (and the norm's statistics) and
// nothing else.
#include "ops/autograd.h"

namespace alore::ops {
namespace {

class KronLinear : public torch::autograd::Function<KronLinear> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& scale, const Tensor& down,
                        const Tensor& up) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({x, scale, down, up});
    return kron_linear_op().call(x, scale, down, up);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    if (!grad[0].defined()) return variable_list(4);
    const auto saved = ctx->get_saved_variables();
    NeededGrads needed(ctx);
    const Mask4 mask{needed.next(), needed.next(), needed.next(), needed.next()};
    auto [dx, dscale, ddown, dup] =
        kron_linear_backward_op().call(grad[0], saved[0], saved[1], saved[2], saved[3], mask);
    return {dx, dscale, ddown, dup};
  }
};

class Alore : public torch::autograd::Function<Alore> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& scale, const Tensor& down,
                        const Tensor& up, const OptTensor& seed, double dropout_p) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({x, scale, down, up, unwrap(seed)});
    ctx->saved_data["dropout_p"] = dropout_p;
    return alore_op().call(x, scale, down, up, seed, dropout_p);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    if (!grad[0].defined()) return variable_list(6);
    const auto saved = ctx->get_saved_variables();
    NeededGrads needed(ctx);
    const Mask4 mask{needed.next(), needed.next(), needed.next(), needed.next()};
    auto [dx, dscale, ddown, dup] =
        alore_backward_op().call(grad[0], saved[0], saved[1], saved[2], saved[3], wrap(saved[4]),
                                 ctx->saved_data["dropout_p"].toDouble(), mask);
    return {dx, dscale, ddown, dup, Tensor(), Tensor()};
  }
};

// Both forms of the norm, told apart by `residual`: the sum is an output of the one and not there in the
// other. Outputs: y, sum, mean, rstd.
class LayerNormAlore : public torch::autograd::Function<LayerNormAlore> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const OptTensor& residual,
                               const OptTensor& weight, const OptTensor& bias, double eps,
                               const Tensor& scale, const Tensor& down, const Tensor& up,
                               const OptTensor& seed, double dropout_p,
                               std::optional<at::ScalarType> out_dtype) {
    const at::AutoDispatchBelowADInplaceOrView below;
    Tensor y, sum, mean, rstd;
    if (residual.has_value()) {
      std::tie(y, sum, mean, rstd) = add_layer_norm_alore_op().call(x, *residual, weight, bias, eps, scale,
                                                                    down, up, seed, dropout_p, out_dtype);
    } else {
      std::tie(y, mean, rstd) =
          layer_norm_alore_op().call(x, weight, bias, eps, scale, down, up, seed, dropout_p, out_dtype);
    }
    ctx->save_for_backward({residual.has_value() ? sum : x, unwrap(weight), unwrap(bias), mean, rstd, scale,
                            down, up, unwrap(seed)});
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->saved_data["y_dtype"] = static_cast<int64_t>(y.scalar_type());
    ctx->set_materialize_grads(false);  // else zeros for mean, rstd and an unused sum, in every backward
    ctx->mark_non_differentiable({mean, rstd});
    if (!residual.has_value()) return {y, mean, rstd};
    return {y, sum, mean, rstd};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const bool has_residual = ctx->saved_data["has_residual"].toBool();
    const Tensor grad_sum = has_residual ? grad[1] : Tensor();
    if (!grad[0].defined() && !grad_sum.defined()) return variable_list(11);
    const auto s = ctx->get_saved_variables();
    const auto y_dtype = static_cast<at::ScalarType>(ctx->saved_data["y_dtype"].toInt());
    const Tensor grad_y = grad[0].defined() ? grad[0] : at::zeros_like(s[0], s[0].options().dtype(y_dtype));
    NeededGrads needed(ctx);
    const bool x_needed = needed.next(), residual_needed = needed.next(has_residual);
    const Mask6 mask{x_needed || residual_needed,
                     needed.next(s[1].defined()),
                     needed.next(s[2].defined()),
                     needed.next(),
                     needed.next(),
                     needed.next()};
    auto [dx, dweight, dbias, dscale, ddown, dup] = layer_norm_alore_backward_op().call(
        grad_y, s[0], wrap(s[1]), wrap(s[2]), s[3], s[4], s[5], s[6], s[7], wrap(s[8]),
        ctx->saved_data["dropout_p"].toDouble(), mask, wrap(grad_sum));
    return {x_needed ? dx : Tensor(),
            residual_needed ? dx : Tensor(),
            dweight,
            dbias,
            Tensor(),
            dscale,
            ddown,
            dup,
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

Tensor kron_linear_autograd(const Tensor& x, const Tensor& scale, const Tensor& down, const Tensor& up) {
  return KronLinear::apply(x, scale, down, up);
}

Tensor alore_autograd(const Tensor& x, const Tensor& scale, const Tensor& down, const Tensor& up,
                      const OptTensor& seed, double dropout_p) {
  return Alore::apply(x, scale, down, up, seed, dropout_p);
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_alore_autograd(const Tensor& x, const OptTensor& weight,
                                                             const OptTensor& bias, double eps,
                                                             const Tensor& scale, const Tensor& down,
                                                             const Tensor& up, const OptTensor& seed,
                                                             double dropout_p,
                                                             std::optional<at::ScalarType> out_dtype) {
  auto out =
      LayerNormAlore::apply(x, std::nullopt, weight, bias, eps, scale, down, up, seed, dropout_p, out_dtype);
  return {out[0], out[1], out[2]};
}

T4 add_layer_norm_alore_autograd(const Tensor& x, const Tensor& residual, const OptTensor& weight,
                                 const OptTensor& bias, double eps, const Tensor& scale, const Tensor& down,
                                 const Tensor& up, const OptTensor& seed, double dropout_p,
                                 std::optional<at::ScalarType> out_dtype) {
  auto out = LayerNormAlore::apply(x, OptTensor(residual), weight, bias, eps, scale, down, up, seed,
                                   dropout_p, out_dtype);
  return {out[0], out[1], out[2], out[3]};
}

T4 kron_linear_backward_autograd(const Tensor& grad_out, const Tensor& x, const Tensor& scale,
                                 const Tensor& down, const Tensor& up, Mask4 mask) {
  return once_differentiable(
      "kron_linear", [&] { return kron_linear_backward_op().call(grad_out, x, scale, down, up, mask); },
      grad_out, x, scale, down, up);
}

T4 alore_backward_autograd(const Tensor& grad_out, const Tensor& x, const Tensor& scale, const Tensor& down,
                           const Tensor& up, const OptTensor& seed, double dropout_p, Mask4 mask) {
  return once_differentiable(
      "alore", [&] { return alore_backward_op().call(grad_out, x, scale, down, up, seed, dropout_p, mask); },
      grad_out, x, scale, down, up);
}

T6 layer_norm_alore_backward_autograd(const Tensor& grad_out, const Tensor& x, const OptTensor& weight,
                                      const OptTensor& bias, const Tensor& mean, const Tensor& rstd,
                                      const Tensor& scale, const Tensor& down, const Tensor& up,
                                      const OptTensor& seed, double dropout_p, Mask6 mask,
                                      const OptTensor& grad_sum) {
  return once_differentiable(
      "layer_norm_alore",
      [&] {
        return layer_norm_alore_backward_op().call(grad_out, x, weight, bias, mean, rstd, scale, down, up,
                                                   seed, dropout_p, mask, grad_sum);
      },
      grad_out, x, weight, bias, scale, down, up, grad_sum);
}

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, Autograd, m) {
  using namespace alore::ops;
  m.impl("kron_linear", kron_linear_autograd);
  m.impl("kron_linear_backward", kron_linear_backward_autograd);
  m.impl("alore", alore_autograd);
  m.impl("alore_backward", alore_backward_autograd);
  m.impl("layer_norm_alore", layer_norm_alore_autograd);
  m.impl("add_layer_norm_alore", add_layer_norm_alore_autograd);
  m.impl("layer_norm_alore_backward", layer_norm_alore_backward_autograd);
}
