// The primitives that ops are composed of, on CPU. backend_cuda.h offers the same names; ops.h is written
// once over both. All matrices are 2-D and contiguous, [num_tokens, features]. 16-bit tensors are computed in
// float32 and rounded once.
#pragma once

#include "ops/backend.h"

namespace alore::ops {

struct CpuBackend {
  struct Guard {
    explicit Guard(const Tensor&) {}
    NoAutocast no_autocast;
  };

  // out = beta * out + x @ W', beta 0 or 1. out may be x where the map is square.
  static void kron_forward(const Tensor& x, Factors f, double beta, const Tensor& out);
  // grad_x = beta * grad_x + grad_out @ W'^T unless grad_x is undefined.
  static FactorGrads kron_backward(const Tensor& x, const Tensor& grad_out, Factors f, double beta,
                                   const Tensor& grad_x);

  // Fills mean and rstd, [num_tokens].
  static Tensor layer_norm_forward(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                   double eps, at::ScalarType out_dtype, const Tensor& mean,
                                   const Tensor& rstd);
  static Tensor layer_norm_recompute(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                     const Tensor& mean, const Tensor& rstd, at::ScalarType out_dtype);
  // The gradient of the norm's output is grad_a + grad_b.
  static Tensor layer_norm_backward(const Tensor& grad_a, const Tensor& grad_b, const Tensor& x,
                                    const OptTensor& weight, const Tensor& mean, const Tensor& rstd);
  static std::pair<Tensor, Tensor> layer_norm_affine_backward(const Tensor& grad_a, const Tensor& grad_b,
                                                              const Tensor& x, const Tensor& mean,
                                                              const Tensor& rstd,
                                                              at::ScalarType affine_dtype);

  // out = (base defined ? base : 0) + dropout(branch). p > 0.
  static void dropout_add(const Tensor& base, const Tensor& branch, const Tensor& seed, double p,
                          const Tensor& out);
};

}  // namespace alore::ops
