#include "ops/norm_lora.h"

#include "ops/lora.h"

namespace alore::ops {
namespace {

OptTensor to(const OptTensor& t, at::ScalarType type) {
  return t.has_value() ? OptTensor(t->to(type)) : std::nullopt;
}

// The norm in the accumulate type; mean and rstd as [..., 1].
std::tuple<Tensor, Tensor, Tensor> wide_norm(const NormLoraCall& call) {
  const auto acc = accumulate_type(call.x.scalar_type());
  return at::native_layer_norm_symint(call.x.to(acc), {call.x.sym_size(-1)}, to(call.norm_weight, acc),
                                      to(call.norm_bias, acc), call.eps);
}

struct Composed {
  static T7 forward(const Tensor& x, const OptTensor& norm_weight, const OptTensor& norm_bias, double eps,
                    const Tensor& weight, const OptTensor& bias, const Tensor& lora_a, const Tensor& lora_b,
                    const Tensor& coeff, double mask_p, bool training) {
    const NoAutocast no_autocast;
    return layer_norm_mlae_linear(x, norm_weight, norm_bias, eps, weight, bias, lora_a, lora_b, coeff, mask_p,
                                  training, compose_norm_lora);
  }

  static T8 backward(const Tensor& grad_out, const OptTensor& grad_normalised, const Tensor& x,
                     const OptTensor& norm_weight, const OptTensor& norm_bias, double eps, const Tensor& mean,
                     const Tensor& rstd, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                     const Tensor& coeff, const Tensor& mask, const Tensor& code, const Tensor& operand,
                     Mask8 wanted) {
    const NoAutocast no_autocast;
    return layer_norm_mlae_linear_backward(grad_out, grad_normalised, x, norm_weight, norm_bias, eps, mean,
                                           rstd, weight, lora_a, lora_b, coeff, mask, code, operand, wanted,
                                           compose_norm_lora_backward);
  }
};

}  // namespace

T7 pack(const NormLoraOutputs& o) { return {o.out, o.normalised, o.code, o.operand, o.mask, o.mean, o.rstd}; }

T8 pack(const Grads8& g) { return {g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]}; }

Tensor padded_rows(c10::SymIntArrayRef sizes, int64_t padding, const at::TensorOptions& options) {
  std::vector<c10::SymInt> whole = sizes.vec();
  whole.back() = whole.back() + padding;
  return at::empty_symint(whole, options).narrow_symint(-1, 0, sizes.back());
}

kernels::NormLoraShape norm_lora_shape(const NormLoraCall& call, int64_t num_tokens) {
  const auto affine = call.norm_weight.has_value() ? call.norm_weight : call.norm_bias;
  return {{num_tokens, call.weight.size(1), call.weight.size(0), call.lora_a.size(0),
           call.lora_a.size(0) / call.coeff.size(0), kernel_dtype(call.x.scalar_type()),
           kernel_dtype(call.lora_a.scalar_type())},
          kernel_dtype(call.weight.scalar_type()),
          kernel_dtype(affine.has_value() ? affine->scalar_type() : at::kFloat)};
}

NormLoraOutputs compose_norm_lora(const NormLoraCall& call, double mask_p, bool training) {
  const auto type = call.x.scalar_type();
  auto [wide, mean, rstd] = wide_norm(call);
  const kernels::LoraShape shape{.in_features = call.weight.sym_size(1).guard_int(__FILE__, __LINE__),
                                 .out_features = call.weight.sym_size(0).guard_int(__FILE__, __LINE__),
                                 .rank = call.lora_a.sym_size(0).guard_int(__FILE__, __LINE__),
                                 .activation = kernel_dtype(type)};
  const int64_t padding = kernels::norm_lora_padding(shape, kernel_dtype(call.weight.scalar_type()));
  const Tensor normalised = padded_rows(call.x.sym_sizes(), padding, call.x.options());
  normalised.copy_(wide);
  auto [out, code, operand, mask] = mlae_linear_op().call(normalised, call.weight, call.bias, call.lora_a,
                                                          call.lora_b, call.coeff, mask_p, training);
  return {out, normalised, code, operand, mask, mean.squeeze(-1), rstd.squeeze(-1)};
}

Grads8 compose_norm_lora_backward(const NormLoraCall& call, const NormLoraSaved& saved, Mask8 wanted) {
  const auto type = call.x.scalar_type(), acc = accumulate_type(type);
  Grads8 grads;
  const bool through_norm = wanted[0] || wanted[1] || wanted[2];
  const Tensor normalised = std::get<0>(wide_norm(call)).to(type);
  auto [dn, dweight, dbias, da, db, dcoeff] = masked_lora_linear_backward_op().call(
      saved.grad_out, normalised, call.weight, call.lora_a, call.lora_b, call.coeff, saved.mask, saved.code,
      saved.operand, {through_norm, wanted[3], wanted[4], wanted[5], wanted[6], wanted[7]});
  grads[3] = dweight, grads[4] = dbias, grads[5] = da, grads[6] = db, grads[7] = dcoeff;
  if (!through_norm) return grads;
  dn = dn.to(acc);
  if (saved.grad_normalised.defined()) dn = dn + saved.grad_normalised;
  auto [dx, dnorm_weight, dnorm_bias] = at::native_layer_norm_backward_symint(
      dn, call.x.to(acc), {call.x.sym_size(-1)}, saved.mean.unsqueeze(-1), saved.rstd.unsqueeze(-1),
      to(call.norm_weight, acc), to(call.norm_bias, acc), {wanted[0], wanted[1], wanted[2]});
  if (wanted[0]) grads[0] = dx.to(type);
  if (wanted[1]) grads[1] = dnorm_weight.to(call.norm_weight->scalar_type());
  if (wanted[2]) grads[2] = dnorm_bias.to(call.norm_bias->scalar_type());
  return grads;
}

}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, CompositeExplicitAutograd, m) {
  m.impl("layer_norm_mlae_linear", alore::ops::Composed::forward);
  m.impl("layer_norm_mlae_linear_backward", alore::ops::Composed::backward);
}
