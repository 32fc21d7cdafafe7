#include "ops/backend_cuda.h"

#include "kernels/dropout.h"
#include "kernels/kron.h"
#include "kernels/layer_norm.h"
#include "ops/cuda_call.h"

namespace alore::ops {
namespace {

using kernels::CudaContext;
using kernels::DType;

kernels::LayerNormShape norm_shape(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                   at::ScalarType out_dtype) {
  const Tensor affine = weight.has_value() && weight->defined() ? *weight : bias.value_or(Tensor());
  const DType input = kernel_dtype(x.scalar_type());
  return {x.size(0), x.size(1), input, kernel_dtype(out_dtype),
          affine.defined() ? kernel_dtype(affine.scalar_type()) : input};
}

}  // namespace

void CudaBackend::kron_forward(const Tensor& x, Factors f, double beta, const Tensor& out) {
  const auto shape = kron_shape(x, f.scale, f.down, f.up);
  if (shape.num_tokens == 0) return;
  const auto plan = kernels::plan_kron_forward(shape);
  const Tensor scale = f.scale.contiguous(), down = f.down.contiguous(), up = f.up.contiguous();
  const Tensor workspace = bytes(plan.workspace_bytes, x);
  kernels::kron_forward(current_context(), shape, plan, {read(scale), read(down), read(up)}, read(x),
                        static_cast<float>(beta), write(out), write(workspace));
}

FactorGrads CudaBackend::kron_backward(const Tensor& x, const Tensor& grad_out, Factors f, double beta,
                                       const Tensor& grad_x) {
  const auto shape = kron_shape(x, f.scale, f.down, f.up);
  if (shape.num_tokens == 0) return zero_grads(f);
  const auto plan = kernels::plan_kron_backward(shape);
  const Tensor scale = f.scale.contiguous(), down = f.down.contiguous(), up = f.up.contiguous();
  const FactorGrads grads{at::empty_like(scale), at::empty_like(down), at::empty_like(up)};
  const Tensor workspace = bytes(plan.workspace_bytes, x);
  kernels::kron_backward(current_context(), shape, plan, {read(scale), read(down), read(up)}, read(x),
                         read(grad_out), static_cast<float>(beta), write(grad_x),
                         {write(grads.scale), write(grads.down), write(grads.up)}, write(workspace));
  return grads;
}

Tensor CudaBackend::layer_norm_forward(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                       double eps, at::ScalarType out_dtype, const Tensor& mean,
                                       const Tensor& rstd) {
  const auto shape = norm_shape(x, weight, bias, out_dtype);
  const OptTensor w = contiguous(weight), b = contiguous(bias);
  Tensor out = at::empty(x.sizes(), x.options().dtype(out_dtype));
  kernels::layer_norm_forward(current_context(), shape, read(x), read(w), read(b), eps, write(out),
                              write(mean), write(rstd));
  return out;
}

Tensor CudaBackend::layer_norm_recompute(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                         const Tensor& mean, const Tensor& rstd, at::ScalarType out_dtype) {
  const auto shape = norm_shape(x, weight, bias, out_dtype);
  const OptTensor w = contiguous(weight), b = contiguous(bias);
  Tensor out = at::empty(x.sizes(), x.options().dtype(out_dtype));
  kernels::layer_norm_recompute(current_context(), shape, read(x), read(w), read(b), read(mean), read(rstd),
                                write(out));
  return out;
}

Tensor CudaBackend::layer_norm_backward(const Tensor& grad_a, const Tensor& grad_b, const Tensor& x,
                                        const OptTensor& weight, const Tensor& mean, const Tensor& rstd) {
  const auto shape = norm_shape(x, weight, std::nullopt, grad_a.scalar_type());
  const OptTensor w = contiguous(weight);
  Tensor grad_x = at::empty_like(x);
  kernels::layer_norm_backward(current_context(), shape, read(grad_a), read(grad_b), read(x), read(w),
                               read(mean), read(rstd), write(grad_x));
  return grad_x;
}

std::pair<Tensor, Tensor> CudaBackend::layer_norm_affine_backward(const Tensor& grad_a, const Tensor& grad_b,
                                                                  const Tensor& x, const Tensor& mean,
                                                                  const Tensor& rstd,
                                                                  at::ScalarType affine_dtype) {
  auto shape = norm_shape(x, std::nullopt, std::nullopt, grad_a.scalar_type());
  shape.affine = kernel_dtype(affine_dtype);
  const int64_t blocks = kernels::plan_reduce_blocks(x.size(0), 2 * x.size(1));
  const Tensor partial = at::empty({blocks, 2, x.size(1)}, mean.options());
  const auto options = x.options().dtype(affine_dtype);
  Tensor grad_weight = at::empty({x.size(1)}, options), grad_bias = at::empty({x.size(1)}, options);
  kernels::layer_norm_affine_backward(current_context(), shape, read(grad_a), read(grad_b), read(x),
                                      read(mean), read(rstd), write(grad_weight), write(grad_bias), blocks,
                                      write(partial));
  return {grad_weight, grad_bias};
}

void CudaBackend::dropout_add(const Tensor& base, const Tensor& branch, const Tensor& seed, double p,
                              const Tensor& out) {
  kernels::dropout_add(current_context(), kernel_dtype(out.scalar_type()), out.numel(), read(base),
                       read(branch), seed.const_data_ptr<int64_t>(), p, write(out));
}

}  // namespace alore::ops
