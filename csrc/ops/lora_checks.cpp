// Checks of the low-rank linears that need to know what their forward keeps.
#include "ops/lora.h"

namespace alore::ops {

void check_mask_p(const OpName& op, double p) {
  TORCH_CHECK(p >= 0.0 && p < 1.0, op, ": mask_p must be in [0, 1), got ", p);
}

void check_lora_backward(const OpName& op, const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                         const Tensor& lora_a, const Tensor& lora_b, const Tensor& coeff,
                         const OptTensor& mask, const Tensor& code, const Tensor& operand) {
  const bool masked = mask.has_value() && mask->defined();
  check_lora(op, x, weight, std::nullopt, lora_a, lora_b, coeff, masked ? Coeff::kPerExpert : Coeff::kPerRow);
  check_grad(op, grad_out, lora_output_sizes(x, weight), x, x.scalar_type());
  const auto must_be = [&](const char* name, const Tensor& t, c10::SymIntArrayRef sizes,
                           at::ScalarType type) {
    TORCH_CHECK(t.device() == x.device(), op, ": ", name, " must be on x's device ", x.device(), ", got ",
                t.device());
    TORCH_CHECK(t.layout() == at::kStrided, op, ": ", name, " must be a dense tensor, got layout ",
                t.layout());
    TORCH_CHECK(t.sym_sizes() == sizes && t.scalar_type() == type, op, ": ", name, " must be ", type, " ",
                sizes, " as the forward returned it, got ", t.scalar_type(), " ", t.sym_sizes());
  };
  if (masked) must_be("mask", *mask, coeff.sym_sizes(), accumulate_type(x.scalar_type()));
  const LoraKept kept(x, weight, lora_a);
  must_be("code", code, kept.code, x.scalar_type());
  must_be("operand", operand, kept.operand, x.scalar_type());
}

}  // namespace alore::ops
