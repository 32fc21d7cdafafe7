// Autograd of masked_lora_linear and mlae_linear, and what autograd must know of the in-place merges.
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

template <typename... Tensors>
void refuse_recording(const char* op, const Tensors&... tensors) {
  TORCH_CHECK(!any_requires_grad(tensors...), op,
              ": merging is not differentiable; call it under torch.no_grad()");
}

// Asked before anything is written: an inference tensor has no version to bump outside inference mode.
void refuse_inference(const char* op, const char* name, const OptTensor& t) {
  TORCH_CHECK(!t.has_value() || !t->defined() || !t->is_inference() || c10::InferenceMode::is_enabled(), op,
              ": ", name, " was made in inference mode and can only be changed there");
}

void bump_version(const OptTensor& t) {
  if (t.has_value() && t->defined() && !t->is_inference()) torch::autograd::impl::bump_version(*t);
}

void merge_kron_autograd(const Tensor& weight, const OptTensor& bias, const Tensor& scale, const Tensor& down,
                         const Tensor& up, std::string_view side) {
  refuse_recording("merge_kron_", weight, bias, scale, down, up);
  refuse_inference("merge_kron_", "weight", weight);
  refuse_inference("merge_kron_", "bias", bias);
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    merge_kron__op().call(weight, bias, scale, down, up, side);
  }
  bump_version(weight);
  bump_version(bias);
}

void merge_lora_autograd(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                         const Tensor& coeff) {
  refuse_recording("merge_lora_", weight, lora_a, lora_b, coeff);
  refuse_inference("merge_lora_", "weight", weight);
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    merge_lora__op().call(weight, lora_a, lora_b, coeff);
  }
  bump_version(weight);
}

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, Autograd, m) {
  using namespace alore::ops;
  m.impl("masked_lora_linear", masked_lora_linear_autograd);
  m.impl("mlae_linear", mlae_linear_autograd);
  m.impl("masked_lora_linear_backward", masked_lora_linear_backward_autograd);
  m.impl("merge_kron_", merge_kron_autograd);
  m.impl("merge_lora_", merge_lora_autograd);
}
