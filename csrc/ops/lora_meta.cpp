// Shapes and dtypes of the low-rank linears without data, behind the real kernels' own checks.
#include "ops/lora.h"

namespace alore::ops {
namespace {

Tensor empty(c10::SymIntArrayRef sizes, const Tensor& like) {
  return at::empty_symint(sizes, like.options());
}

Tensor empty_like_if(bool yes, const Tensor& t) { return yes ? empty(t.sym_sizes(), t) : Tensor(); }

T3 forward_shapes(const Tensor& x, const Tensor& weight, const Tensor& lora_a) {
  const LoraKept kept(x, weight, lora_a);
  return {empty(lora_output_sizes(x, weight), x), empty(kept.code, x), empty(kept.operand, x)};
}

T3 masked_lora_linear_meta(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& lora_a,
                           const Tensor& lora_b, const Tensor& coeff) {
  check_lora("masked_lora_linear", x, weight, bias, lora_a, lora_b, coeff, Coeff::kPerRow);
  return forward_shapes(x, weight, lora_a);
}

T4 mlae_linear_meta(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& lora_a,
                    const Tensor& lora_b, const Tensor& coeff, double mask_p, bool) {
  check_lora("mlae_linear", x, weight, bias, lora_a, lora_b, coeff, Coeff::kPerExpert);
  check_mask_p("mlae_linear", mask_p);
  auto [out, code, operand] = forward_shapes(x, weight, lora_a);
  const auto options = coeff.options().dtype(accumulate_type(x.scalar_type()));
  return {out, code, operand, at::empty_symint(coeff.sym_sizes(), options)};
}

T6 masked_lora_linear_backward_meta(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                    const Tensor& lora_a, const Tensor& lora_b, const Tensor& coeff,
                                    const OptTensor& mask, const Tensor& code, const Tensor& operand,
                                    Mask6 wanted) {
  check_lora_backward("masked_lora_linear_backward", grad_out, x, weight, lora_a, lora_b, coeff, mask, code,
                      operand);
  return {empty_like_if(wanted[0], x),
          empty_like_if(wanted[1], weight),
          wanted[2] ? empty({weight.sym_size(0)}, x) : Tensor(),
          empty_like_if(wanted[3], lora_a),
          empty_like_if(wanted[4], lora_b),
          empty_like_if(wanted[5], coeff)};
}

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, Meta, m) {
  using namespace alore::ops;
  m.impl("masked_lora_linear", masked_lora_linear_meta);
  m.impl("mlae_linear", mlae_linear_meta);
  m.impl("masked_lora_linear_backward", masked_lora_linear_backward_meta);
}
