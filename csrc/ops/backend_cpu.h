// The primitives that ops are composed of, on CPU; ops.h is written once over this and backend_cuda.h. All
// matrices are 2-D and contiguous, [num_tokens, features]. 16-bit tensors are computed in float32 and rounded
// once.
#pragma once

#include "ops/backend.h"

namespace alore::ops {

struct CpuBackend {
  struct Guard {
    explicit Guard(const Tensor&) {}
    NoAutocast no_autocast;
  };

  // The whole call in one pass, where there is a kernel for it: false where not, and then nothing was
  // written. sum is filled when defined (call.residual is then), mean and rstd with a norm.
  static bool fused_forward(const AloreCall& call, const Tensor& out, const Tensor& sum, const Tensor& mean,
                            const Tensor& rstd) {
    return false;
  }
  // Fills grad_x when defined, and grads. call.x is the sum where the forward had a residual.
  static bool fused_backward(const AloreCall& call, const Tensor& grad_out, const Tensor& grad_sum,
                             const Tensor& mean, const Tensor& rstd, const Tensor& grad_x,
                             FactorGrads& grads) {
    return false;
  }

  // out = beta * out + x @ W', beta 0 or 1. out may be x where the map is square.
  static void kron_forward(const Tensor& x, Factors f, double beta, const Tensor& out);
  // grad_x = beta * grad_x + grad_out @ W'^T unless grad_x is undefined.
  static FactorGrads kron_backward(const Tensor& x, const Tensor& grad_out, Factors f, double beta,
                                   const Tensor& grad_x);

  struct Norm {
    const OptTensor& weight;
    const OptTensor& bias;
    const Tensor& mean;  // [num_tokens], accumulate type
    const Tensor& rstd;
  };

  // y + y @ W', y = layer_norm(x). Fills mean and rstd.
  static Tensor norm_kron_forward(const Tensor& x, Norm norm, double eps, Factors f,
                                  at::ScalarType out_dtype);
  // The gradient of y is grad_base + grad_branch @ W'^T. Fills grad_x, grad_weight and grad_bias where
  // defined.
  static FactorGrads norm_kron_backward(const Tensor& x, Norm norm, Factors f, const Tensor& grad_base,
                                        const Tensor& grad_branch, const Tensor& grad_x,
                                        const Tensor& grad_weight, const Tensor& grad_bias);
  // layer_norm(x) alone. Fills mean and rstd.
  static Tensor layer_norm_forward(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                   double eps, at::ScalarType out_dtype, const Tensor& mean,
                                   const Tensor& rstd);

  // out = (base defined ? base : 0) + dropout(branch). p > 0.
  static void dropout_add(const Tensor& base, const Tensor& branch, const Tensor& seed, double p,
                          const Tensor& out);

  // out += (x @ a^T * coeff) @ b^T
  static void lora_forward(const Tensor& x, Lora lora, const Tensor& out);
  // Adds the low-rank term's part to grad_x unless it is undefined.
  static LoraGrads lora_backward(const Tensor& x, const Tensor& grad_out, Lora lora, const Tensor& grad_x);
};

}  // namespace alore::ops
