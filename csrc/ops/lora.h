// masked_lora_linear and mlae_linear, written once over a backend's two primitives (lora_cpu.cpp,
// lora_cuda.cpp).
//
// y = x W^T + b + ((x A^T) * c) B^T, c[j] = coeff[j / expert_rank] * mask[j / expert_rank]. The side path
// either takes the rank term into the base product, [x | t] [W | Bc]^T, or writes b + that term first and
// lets the base product accumulate onto it: the product reads it in its epilogue, where adding to a finished
// y would read and write all of it again. Where W is float32 under 16-bit activations, the update is folded
// into W before it is rounded, which it must be in any case.
#pragma once

#include "kernels/lora.h"
#include "ops/backend.h"
#include "ops/dispatch.h"

namespace alore::ops {

// One call with x flattened to [num_tokens, in_features].
struct LoraCall {
  Tensor x;
  const Tensor& weight;
  OptTensor bias;  // never an undefined tensor
  const Tensor& lora_a;
  const Tensor& lora_b;
  const Tensor& coeff;  // [num_experts]
  bool folds;

  LoraCall(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& lora_a,
           const Tensor& lora_b, const Tensor& coeff)
      : x(flatten_tokens(x)),
        weight(weight),
        bias(given(bias)),
        lora_a(lora_a),
        lora_b(lora_b),
        coeff(coeff),
        folds(is_folding(x, weight)) {}

  int64_t rank() const { return lora_a.size(0); }
  int64_t expert_rank() const { return rank() / coeff.size(0); }
};

// Where the mask comes from: given (backward), drawn with probability p of 0 into `drawn`, or none.
struct LoraMask {
  OptTensor given;
  bool draw = false;
  double p = 0.0;
  Tensor drawn;  // [num_experts], accumulate type; undefined where nobody asks. All 1 without draw.
};

inline kernels::LoraShape lora_shape(const Tensor& x2d, const Tensor& weight, const Tensor& lora_a,
                                     int64_t expert_rank) {
  return {x2d.size(0),
          weight.size(1),
          weight.size(0),
          lora_a.size(0),
          expert_rank,
          kernel_dtype(x2d.scalar_type()),
          kernel_dtype(lora_a.scalar_type())};
}

// What forward keeps. The shapes do not depend on the device: Meta says the same.
struct LoraKept {
  std::vector<c10::SymInt> code, operand;

  LoraKept(const Tensor& x, const Tensor& weight, const Tensor& lora_a) : code(x.sym_sizes().vec()) {
    const bool folds = is_folding(x, weight);
    const kernels::LoraShape shape{.in_features = weight.sym_size(1).guard_int(__FILE__, __LINE__),
                                   .out_features = weight.sym_size(0).guard_int(__FILE__, __LINE__),
                                   .rank = lora_a.sym_size(0).guard_int(__FILE__, __LINE__),
                                   .activation = kernel_dtype(x.scalar_type())};
    code.back() = folds ? 0 : kernels::lora_code_width(shape.activation, shape.rank);
    operand =
        folds ? weight.sym_sizes().vec() : std::vector<c10::SymInt>{kernels::lora_operand_elements(shape)};
  }
};

template <typename Backend>
T3 lora_forward(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& lora_a,
                const Tensor& lora_b, const Tensor& coeff, const LoraMask& mask) {
  const typename Backend::Guard guard(x);
  const LoraCall call(x, weight, bias, lora_a, lora_b, coeff);
  const LoraKept kept(x, weight, lora_a);
  const Tensor code = at::empty(C10_AS_INTARRAYREF_SLOW(kept.code), call.x.options());
  const Tensor operand = at::empty(C10_AS_INTARRAYREF_SLOW(kept.operand), call.x.options());
  const Tensor flat_code = code.view({call.x.size(0), code.size(-1)});
  const Tensor out = Backend::forward(call, mask, flat_code, operand);
  auto sizes = x.sizes().vec();
  sizes.back() = out.size(1);
  return {out.view(sizes), code, operand};
}

template <typename Backend>
T3 masked_lora_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& lora_a,
                      const Tensor& lora_b, const Tensor& coeff) {
  check_lora("masked_lora_linear", x, weight, bias, lora_a, lora_b, coeff, Coeff::kPerRow);
  return lora_forward<Backend>(x, weight, bias, lora_a, lora_b, coeff, {});
}

template <typename Backend>
T4 mlae_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& lora_a,
               const Tensor& lora_b, const Tensor& coeff, double mask_p, bool training) {
  check_lora("mlae_linear", x, weight, bias, lora_a, lora_b, coeff, Coeff::kPerExpert);
  check_mask_p("mlae_linear", mask_p);
  LoraMask mask{.draw = training && mask_p > 0.0, .p = mask_p};
  mask.drawn = at::empty(coeff.sizes(), coeff.options().dtype(accumulate_type(x.scalar_type())));
  auto [out, code, operand] = lora_forward<Backend>(x, weight, bias, lora_a, lora_b, coeff, mask);
  return {out, code, operand, mask.drawn};
}

template <typename Backend>
T6 masked_lora_linear_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                               const Tensor& lora_a, const Tensor& lora_b, const Tensor& coeff,
                               const OptTensor& mask, const Tensor& code, const Tensor& operand,
                               Mask6 wanted) {
  check_lora_backward("masked_lora_linear_backward", grad_out, x, weight, lora_a, lora_b, coeff, mask, code,
                      operand);
  const typename Backend::Guard guard(x);
  const LoraCall call(x, weight, std::nullopt, lora_a, lora_b, coeff);
  const Tensor grad = flatten_tokens(grad_out);
  const Tensor flat_code = code.contiguous().view({call.x.size(0), code.size(-1)});
  const bool masked = mask.has_value() && mask->defined();
  Tensor grad_x = wanted[0] ? at::empty_like(call.x) : Tensor();
  LoraGrads grads;
  if (call.x.size(0) == 0) {
    grads = {zeros_contiguous(lora_a), zeros_contiguous(lora_b), zeros_contiguous(coeff)};
  } else if (wanted[0] || wanted[3] || wanted[4] || wanted[5]) {
    LoraMask given;
    if (masked) given.given = mask->contiguous();
    grads = Backend::backward(call, given, grad, flat_code, operand.contiguous(), grad_x);
  }
  const auto if_wanted = [&](int k, const Tensor& t) { return wanted[k] ? t : Tensor(); };
  return {if_wanted(0, wanted[0] ? grad_x.view(x.sizes()) : grad_x),
          wanted[1] ? at::mm(grad.t(), call.x).to(weight.scalar_type()) : Tensor(),
          wanted[2] ? grad.sum(0) : Tensor(),
          if_wanted(3, grads.a),
          if_wanted(4, grads.b),
          if_wanted(5, grads.coeff)};
}

template <typename Backend>
void register_lora(torch::Library& m) {
  m.impl("masked_lora_linear", masked_lora_linear<Backend>);
  m.impl("mlae_linear", mlae_linear<Backend>);
  m.impl("masked_lora_linear_backward", masked_lora_linear_backward<Backend>);
}

}  // namespace alore::ops
