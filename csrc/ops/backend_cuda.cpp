#include "ops/backend_cuda.h"

#include "kernels/dropout.h"
#include "kernels/gemm.h"
#include "kernels/kron.h"
#include "kernels/layer_norm.h"
#include "kernels/lora.h"
#include "ops/cuda_call.h"

namespace alore::ops {
namespace {

using kernels::CudaContext;
using kernels::DType;
using kernels::Op;

kernels::LayerNormShape norm_shape(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                   at::ScalarType out_dtype) {
  const Tensor affine = weight.has_value() && weight->defined() ? *weight : bias.value_or(Tensor());
  const DType input = kernel_dtype(x.scalar_type());
  return {x.size(0), x.size(1), input, kernel_dtype(out_dtype),
          affine.defined() ? kernel_dtype(affine.scalar_type()) : input};
}

// A contiguous copy of a low-rank factor in the dtype that the products run in; the factor itself where it is
// that.
Tensor as_operand(const CudaContext& context, const Tensor& factor, at::ScalarType type) {
  const Tensor in = factor.contiguous();
  if (in.scalar_type() == type) return in;
  Tensor out = at::empty(in.sizes(), in.options().dtype(type));
  kernels::cast(context, in.numel(), kernel_dtype(in.scalar_type()), read(in), kernel_dtype(type),
                write(out));
  return out;
}

// The low-rank pass: shapes and operands that forward and backward share.
struct LoraPass {
  CudaContext context;
  kernels::LoraShape shape;
  Tensor a, b, coeff;
  at::TensorOptions code_options, operand_options;

  LoraPass(const Tensor& x, Lora lora)
      : context(current_context()),
        shape{x.size(0),
              x.size(1),
              lora.b.size(0),
              lora.a.size(0),
              kernel_dtype(x.scalar_type()),
              kernel_dtype(lora.a.scalar_type())},
        a(as_operand(context, lora.a, x.scalar_type())),
        b(as_operand(context, lora.b, x.scalar_type())),
        coeff(lora.coeff.contiguous()),
        code_options(x.options().dtype(accumulate_type(x.scalar_type()))),
        operand_options(x.options()) {}

  DType acc() const { return kernels::accumulate_type(shape.activation); }

  // x @ a^T, [num_tokens, R], accumulate type
  Tensor encode(const Tensor& x) const {
    Tensor code = at::empty({shape.num_tokens, shape.rank}, code_options);
    kernels::gemm(context, Op::kNone, Op::kTranspose, shape.num_tokens, shape.rank, shape.in_features,
                  shape.activation, read(x), shape.in_features, read(a), shape.in_features, 0.0f, acc(),
                  write(code), shape.rank);
    return code;
  }

  // grad_out @ b, [num_tokens, R], accumulate type
  Tensor encode_grad(const Tensor& grad_out) const {
    Tensor code = at::empty({shape.num_tokens, shape.rank}, code_options);
    kernels::gemm(context, Op::kNone, Op::kNone, shape.num_tokens, shape.rank, shape.out_features,
                  shape.activation, read(grad_out), shape.out_features, read(b), shape.rank, 0.0f, acc(),
                  write(code), shape.rank);
    return code;
  }

  Tensor scale(const Tensor& code) const {
    Tensor scaled = at::empty({shape.num_tokens, shape.rank}, operand_options);
    kernels::lora_scale(context, shape, read(code), read(coeff), write(scaled));
    return scaled;
  }
};

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

void CudaBackend::lora_forward(const Tensor& x, Lora lora, const Tensor& out) {
  const LoraPass pass(x, lora);
  const auto& s = pass.shape;
  const Tensor scaled = pass.scale(pass.encode(x));
  kernels::gemm(pass.context, Op::kNone, Op::kTranspose, s.num_tokens, s.out_features, s.rank, s.activation,
                read(scaled), s.rank, read(pass.b), s.rank, 1.0f, s.activation, write(out), s.out_features);
}

LoraGrads CudaBackend::lora_backward(const Tensor& x, const Tensor& grad_out, Lora lora,
                                     const Tensor& grad_x) {
  const LoraPass pass(x, lora);
  const auto& s = pass.shape;
  const Tensor code = pass.encode(x), grad_code = pass.encode_grad(grad_out);
  const Tensor scaled = pass.scale(code), scaled_grad = pass.scale(grad_code);
  if (grad_x.defined()) {
    kernels::gemm(pass.context, Op::kNone, Op::kNone, s.num_tokens, s.in_features, s.rank, s.activation,
                  read(scaled_grad), s.rank, read(pass.a), s.in_features, 1.0f, s.activation, write(grad_x),
                  s.in_features);
  }
  // Gradients of A and B leave the products in the accumulate type, whatever the activations are.
  Tensor grad_a = at::empty({s.rank, s.in_features}, pass.code_options);
  kernels::gemm(pass.context, Op::kTranspose, Op::kNone, s.rank, s.in_features, s.num_tokens, s.activation,
                read(scaled_grad), s.rank, read(x), s.in_features, 0.0f, pass.acc(), write(grad_a),
                s.in_features);
  Tensor grad_b = at::empty({s.out_features, s.rank}, pass.code_options);
  kernels::gemm(pass.context, Op::kTranspose, Op::kNone, s.out_features, s.rank, s.num_tokens, s.activation,
                read(grad_out), s.out_features, read(scaled), s.rank, 0.0f, pass.acc(), write(grad_b),
                s.rank);
  const int64_t blocks = kernels::plan_reduce_blocks(s.num_tokens, s.rank);
  const Tensor partial = at::empty({blocks, s.rank}, pass.code_options);
  Tensor grad_coeff = at::empty({s.rank}, lora.coeff.options());
  kernels::lora_coeff_grad(pass.context, s, read(code), read(grad_code), blocks, write(partial),
                           write(grad_coeff));
  LoraGrads grads{at::empty(lora.a.sizes(), lora.a.options()), at::empty(lora.b.sizes(), lora.b.options()),
                  grad_coeff};
  kernels::lora_unpack_gradients(pass.context, s, read(grad_a), read(grad_b), read(pass.coeff),
                                 write(grads.a), write(grads.b));
  return grads;
}

}  // namespace alore::ops
