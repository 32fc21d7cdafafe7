// The ops' logic, written once over a backend's primitives (CpuBackend, CudaBackend).
#pragma once

#include <ATen/ATen.h>

#include "ops/backend.h"

namespace alore::ops {

using Grads4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Grads6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline Tensor wanted(bool yes, const Tensor& t) { return yes ? t : Tensor(); }

inline Tensor like_input(const Tensor& flat, const Tensor& x, bool yes = true) {
  return yes ? flat.view(x.sizes()) : Tensor();
}

inline Tensor with_width(const Tensor& flat, const Tensor& x) {
  auto sizes = x.sizes().vec();
  sizes.back() = flat.size(1);
  return flat.view(sizes);
}

template <typename Backend>
Tensor kron_linear(const Tensor& x, const Tensor& scale, const Tensor& down, const Tensor& up) {
  check_kron("kron_linear", x, scale, down, up, Width::kAny);
  const typename Backend::Guard guard(x);
  const Tensor flat = flatten_tokens(x);
  const Tensor out = at::empty({flat.size(0), scale.size(2) * up.size(2)}, flat.options());
  Backend::kron_forward(flat, {scale, down, up}, 0.0, out);
  return with_width(out, x);
}

template <typename Backend>
Grads4 kron_linear_backward(const Tensor& grad_out, const Tensor& x, const Tensor& scale, const Tensor& down,
                            const Tensor& up, std::array<bool, 4> mask) {
  check_kron("kron_linear_backward", x, scale, down, up, Width::kAny);
  check_grad("kron_linear_backward", grad_out, kron_output_sizes(x, scale, up), x, x.scalar_type());
  const typename Backend::Guard guard(x);
  const Tensor flat = flatten_tokens(x);
  const Tensor grad_x = mask[0] ? at::empty_like(flat) : Tensor();
  const auto grads = Backend::kron_backward(flat, flatten_tokens(grad_out), {scale, down, up}, 0.0, grad_x);
  return {like_input(grad_x, x, mask[0]), wanted(mask[1], grads.scale), wanted(mask[2], grads.down),
          wanted(mask[3], grads.up)};
}

template <typename Backend>
Tensor alore(const Tensor& x, const Tensor& scale, const Tensor& down, const Tensor& up,
             const OptTensor& seed, double dropout_p) {
  check_kron("alore", x, scale, down, up, Width::kResidual);
  check_dropout("alore", x, seed, dropout_p);
  const typename Backend::Guard guard(x);
  const Tensor flat = flatten_tokens(x);
  Tensor out;
  if (dropout_p == 0.0) {
    out = flat.clone();
    Backend::kron_forward(flat, {scale, down, up}, 1.0, out);
  } else {
    out = at::empty_like(flat);
    Backend::kron_forward(flat, {scale, down, up}, 0.0, out);
    Backend::dropout_add(flat, out, *seed, dropout_p, out);
  }
  return like_input(out, x);
}

// The gradient that reaches the adapter's branch: masked as the branch was.
template <typename Backend>
Tensor branch_gradient(const Tensor& grad_out, const OptTensor& seed, double dropout_p) {
  if (dropout_p == 0.0) return grad_out;
  Tensor masked = at::empty_like(grad_out);
  Backend::dropout_add(Tensor(), grad_out, *seed, dropout_p, masked);
  return masked;
}

template <typename Backend>
Grads4 alore_backward(const Tensor& grad_out, const Tensor& x, const Tensor& scale, const Tensor& down,
                      const Tensor& up, const OptTensor& seed, double dropout_p, std::array<bool, 4> mask) {
  check_kron("alore_backward", x, scale, down, up, Width::kResidual);
  check_dropout("alore_backward", x, seed, dropout_p);
  check_grad("alore_backward", grad_out, x.sym_sizes(), x, x.scalar_type());
  const typename Backend::Guard guard(x);
  const Tensor flat = flatten_tokens(x), grad = flatten_tokens(grad_out);
  const Tensor branch = branch_gradient<Backend>(grad, seed, dropout_p);
  const Tensor grad_x = mask[0] ? grad.clone() : Tensor();
  const auto grads = Backend::kron_backward(flat, branch, {scale, down, up}, 1.0, grad_x);
  return {like_input(grad_x, x, mask[0]), wanted(mask[1], grads.scale), wanted(mask[2], grads.down),
          wanted(mask[3], grads.up)};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> layer_norm_alore(const Tensor& x, const OptTensor& weight,
                                                    const OptTensor& bias, double eps, const Tensor& scale,
                                                    const Tensor& down, const Tensor& up,
                                                    const OptTensor& seed, double dropout_p,
                                                    std::optional<at::ScalarType> out_dtype) {
  check_kron("layer_norm_alore", x, scale, down, up, Width::kResidual);
  check_layer_norm("layer_norm_alore", x, weight, bias, eps, out_dtype);
  check_dropout("layer_norm_alore", x, seed, dropout_p);
  const typename Backend::Guard guard(x);
  const Tensor flat = flatten_tokens(x);
  const auto statistics = flat.options().dtype(accumulate_type(x.scalar_type()));
  const Tensor mean = at::empty({flat.size(0)}, statistics), rstd = at::empty({flat.size(0)}, statistics);
  const Tensor out =
      Backend::layer_norm_forward(flat, weight, bias, eps, out_dtype.value_or(x.scalar_type()), mean, rstd);
  if (dropout_p == 0.0) {
    Backend::kron_forward(out, {scale, down, up}, 1.0, out);
  } else {
    const Tensor branch = at::empty_like(out);
    Backend::kron_forward(out, {scale, down, up}, 0.0, branch);
    Backend::dropout_add(out, branch, *seed, dropout_p, out);
  }
  const auto leading = x.sizes().slice(0, x.dim() - 1);
  return {like_input(out, x), mean.view(leading), rstd.view(leading)};
}

template <typename Backend>
Grads6 layer_norm_alore_backward(const Tensor& grad_out, const Tensor& x, const OptTensor& weight,
                                 const OptTensor& bias, const Tensor& mean, const Tensor& rstd,
                                 const Tensor& scale, const Tensor& down, const Tensor& up,
                                 const OptTensor& seed, double dropout_p, std::array<bool, 6> mask) {
  const auto out_dtype = grad_out.scalar_type();
  check_kron("layer_norm_alore_backward", x, scale, down, up, Width::kResidual);
  check_layer_norm("layer_norm_alore_backward", x, weight, bias, 0.0, std::nullopt);
  check_statistics("layer_norm_alore_backward", x, mean, rstd);
  check_dropout("layer_norm_alore_backward", x, seed, dropout_p);
  check_norm_grad("layer_norm_alore_backward", grad_out, x);
  mask[1] = mask[1] && weight.has_value() && weight->defined();
  mask[2] = mask[2] && bias.has_value() && bias->defined();
  const typename Backend::Guard guard(x);
  const Tensor flat = flatten_tokens(x), grad = flatten_tokens(grad_out);
  const Tensor flat_mean = mean.contiguous().view({flat.size(0)}),
               flat_rstd = rstd.contiguous().view({flat.size(0)});
  const Tensor normed = Backend::layer_norm_recompute(flat, weight, bias, flat_mean, flat_rstd, out_dtype);
  const Tensor branch = branch_gradient<Backend>(grad, seed, dropout_p);

  const bool through_norm = mask[0] || mask[1] || mask[2];
  const Tensor grad_normed = through_norm ? at::empty_like(normed) : Tensor();
  const auto grads = Backend::kron_backward(normed, branch, {scale, down, up}, 0.0, grad_normed);
  Tensor grad_x, grad_weight, grad_bias;
  if (mask[0]) grad_x = Backend::layer_norm_backward(grad, grad_normed, flat, weight, flat_mean, flat_rstd);
  if (mask[1] || mask[2]) {
    const auto affine = (weight.has_value() && weight->defined() ? *weight : *bias).scalar_type();
    std::tie(grad_weight, grad_bias) =
        Backend::layer_norm_affine_backward(grad, grad_normed, flat, flat_mean, flat_rstd, affine);
  }
  return {like_input(grad_x, x, mask[0]), wanted(mask[1], grad_weight), wanted(mask[2], grad_bias),
          wanted(mask[3], grads.scale),   wanted(mask[4], grads.down),  wanted(mask[5], grads.up)};
}

// Registers every op of one backend under the current dispatch key.
template <typename Backend>
void register_ops(torch::Library& m) {
  m.impl("kron_linear", kron_linear<Backend>);
  m.impl("kron_linear_backward", kron_linear_backward<Backend>);
  m.impl("alore", alore<Backend>);
  m.impl("alore_backward", alore_backward<Backend>);
  m.impl("layer_norm_alore", layer_norm_alore<Backend>);
  m.impl("layer_norm_alore_backward", layer_norm_alore_backward<Backend>);
}

// merge.cpp: written over the dispatcher, so one function serves CPU and CUDA.
void register_merges(torch::Library& m);

}  // namespace alore::ops
