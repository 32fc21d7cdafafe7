// The primitives that ops are composed of, on CUDA: workspaces are allocated here, kernels are launched on
// the current stream. See backend_cpu.h for what each one computes.
#pragma once

#include <c10/cuda/CUDAGuard.h>

#include "ops/backend.h"

namespace alore::ops {

struct CudaBackend {
  struct Guard {
    explicit Guard(const Tensor& t) : device(t.device()) {}
    c10::cuda::CUDAGuard device;
    NoAutocast no_autocast;
  };

  // The whole call in one pass, where there is a kernel for it: false where not, and then nothing was
  // written. sum is filled when defined (call.residual is then), mean and rstd with a norm.
  static bool fused_forward(const AloreCall& call, const Tensor& out, const Tensor& sum, const Tensor& mean,
                            const Tensor& rstd);
  // Fills grad_x when defined, and grads. call.x is the sum where the forward had a residual.
  static bool fused_backward(const AloreCall& call, const Tensor& grad_out, const Tensor& grad_sum,
                             const Tensor& mean, const Tensor& rstd, const Tensor& grad_x,
                             FactorGrads& grads);

  static void kron_forward(const Tensor& x, Factors f, double beta, const Tensor& out);
  static FactorGrads kron_backward(const Tensor& x, const Tensor& grad_out, Factors f, double beta,
                                   const Tensor& grad_x);

  static Tensor layer_norm_forward(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                   double eps, at::ScalarType out_dtype, const Tensor& mean,
                                   const Tensor& rstd);
  static Tensor layer_norm_recompute(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                     const Tensor& mean, const Tensor& rstd, at::ScalarType out_dtype);
  static Tensor layer_norm_backward(const Tensor& grad_a, const Tensor& grad_b, const Tensor& x,
                                    const OptTensor& weight, const Tensor& mean, const Tensor& rstd);
  static std::pair<Tensor, Tensor> layer_norm_affine_backward(const Tensor& grad_a, const Tensor& grad_b,
                                                              const Tensor& x, const Tensor& mean,
                                                              const Tensor& rstd,
                                                              at::ScalarType affine_dtype);

  static void dropout_add(const Tensor& base, const Tensor& branch, const Tensor& seed, double p,
                          const Tensor& out);
};

}  // namespace alore::ops
