// The ops' logic, written once over a backend's primitives (CpuBackend, CudaBackend).
#pragma once

#include <ATen/ATen.h>

#include "ops/backend.h"

namespace alore::ops {

using Grads4 = T4;
using Grads6 = T6;

inline Tensor wanted(bool yes, const Tensor& t) { return yes ? t : Tensor(); }

inline Tensor like_input(const Tensor& flat, const Tensor& x, bool yes = true) {
  return yes ? flat.view(x.sizes()) : Tensor();
}

inline Tensor with_width(const Tensor& flat, const Tensor& x) {
  auto sizes = x.sizes().vec();
  sizes.back() = flat.size(1);
  return flat.view(sizes);
}

// A backend whose composition joins the norm, the Kronecker map and the residual (CPU: one pass over the
// tokens).
template <typename Backend>
concept FusesNorm = requires { &Backend::norm_kron_forward; };

// out of a call, and sum, mean and rstd where they are defined. Written over the backend's primitives where
// it has no kernel for the whole.
template <typename Backend>
Tensor run_forward(const AloreCall& call, const Tensor& sum, const Tensor& mean, const Tensor& rstd) {
  const int64_t out_dim = call.factors.scale.size(2) * call.factors.up.size(2);
  const Tensor out = at::empty({call.x.size(0), out_dim}, call.x.options().dtype(call.out_dtype));
  if (Backend::fused_forward(call, out, sum, mean, rstd)) return out;

  if (sum.defined()) at::add_out(const_cast<Tensor&>(sum), call.x, call.residual);
  Tensor base = sum.defined() ? sum : call.x;
  const bool dropout = call.dropout_p > 0.0;
  if constexpr (FusesNorm<Backend>) {
    if (call.norm && !dropout) {
      return Backend::norm_kron_forward(base, {call.weight, call.bias, mean, rstd}, call.eps, call.factors,
                                        call.out_dtype);
    }
  }
  if (call.norm) {
    base = Backend::layer_norm_forward(base, call.weight, call.bias, call.eps, call.out_dtype, mean, rstd);
  }
  if (call.add_base && !dropout) {
    const Tensor onto = call.norm ? base : base.clone();
    Backend::kron_forward(base, call.factors, 1.0, onto);
    return onto;
  }
  Backend::kron_forward(base, call.factors, 0.0, out);
  if (call.add_base) Backend::dropout_add(base, out, *call.seed, call.dropout_p, out);
  return out;
}

struct AloreGrads {
  Tensor x;  // undefined where it was not wanted
  FactorGrads factors;
  Tensor weight, bias;  // of the norm, both or neither
};

// The gradient that reaches the adapter's branch: masked as the branch was.
template <typename Backend>
Tensor branch_gradient(const Tensor& grad_out, const AloreCall& call) {
  if (call.dropout_p == 0.0) return grad_out;
  Tensor masked = at::empty_like(grad_out);
  Backend::dropout_add(Tensor(), grad_out, *call.seed, call.dropout_p, masked);
  return masked;
}

// call.x is what the norm or the adapter saw: the sum, where there was a residual. grad_sum may be undefined.
template <typename Backend>
AloreGrads run_backward(const AloreCall& call, const Tensor& grad_out, const Tensor& grad_sum,
                        const Tensor& mean, const Tensor& rstd, bool want_x, bool want_affine) {
  AloreGrads grads;
  if (!want_affine) {
    if (want_x) grads.x = at::empty_like(call.x);
    if (Backend::fused_backward(call, grad_out, grad_sum, mean, rstd, grads.x, grads.factors)) return grads;
  }

  const Tensor branch = branch_gradient<Backend>(grad_out, call);
  if (!call.norm) {
    Tensor grad_x;
    if (want_x) grad_x = call.add_base ? grad_out.clone() : at::empty_like(call.x);
    grads.factors = Backend::kron_backward(call.x, branch, call.factors, call.add_base ? 1.0 : 0.0, grad_x);
    grads.x = grad_x;
    return grads;
  }
  const auto affine = [&] {
    return (call.weight.has_value() && call.weight->defined() ? *call.weight : *call.bias).scalar_type();
  };
  if constexpr (FusesNorm<Backend>) {
    if (want_x) grads.x = at::empty_like(call.x);
    if (want_affine) {
      grads.weight = at::empty({call.x.size(1)}, call.x.options().dtype(affine()));
      grads.bias = at::empty_like(grads.weight);
    }
    grads.factors = Backend::norm_kron_backward(call.x, {call.weight, call.bias, mean, rstd}, call.factors,
                                                grad_out, branch, grads.x, grads.weight, grads.bias);
  } else {
    const Tensor base =
        Backend::layer_norm_recompute(call.x, call.weight, call.bias, mean, rstd, grad_out.scalar_type());
    const Tensor grad_base = want_x || want_affine ? at::empty_like(base) : Tensor();
    grads.factors = Backend::kron_backward(base, branch, call.factors, 0.0, grad_base);
    if (want_x) grads.x = Backend::layer_norm_backward(grad_out, grad_base, call.x, call.weight, mean, rstd);
    if (want_affine) {
      std::tie(grads.weight, grads.bias) =
          Backend::layer_norm_affine_backward(grad_out, grad_base, call.x, mean, rstd, affine());
    }
  }
  if (want_x && grad_sum.defined()) grads.x.add_(grad_sum);
  return grads;
}

inline AloreCall plain_call(const Tensor& flat, Factors factors, const OptTensor& seed, double dropout_p,
                            bool add_base) {
  return {.x = flat,
          .factors = factors,
          .seed = seed,
          .dropout_p = dropout_p,
          .add_base = add_base,
          .out_dtype = flat.scalar_type()};
}

inline Grads4 as_tuple(const AloreGrads& g, const Tensor& x, std::array<bool, 4> mask) {
  return {like_input(g.x, x, mask[0]), wanted(mask[1], g.factors.scale), wanted(mask[2], g.factors.down),
          wanted(mask[3], g.factors.up)};
}

template <typename Backend>
Tensor kron_linear(const Tensor& x, const Tensor& scale, const Tensor& down, const Tensor& up) {
  check_kron("kron_linear", x, scale, down, up, Width::kAny);
  const typename Backend::Guard guard(x);
  const Tensor flat = flatten_tokens(x);
  const auto call = plain_call(flat, {scale, down, up}, std::nullopt, 0.0, false);
  return with_width(run_forward<Backend>(call, {}, {}, {}), x);
}

template <typename Backend>
Grads4 kron_linear_backward(const Tensor& grad_out, const Tensor& x, const Tensor& scale, const Tensor& down,
                            const Tensor& up, std::array<bool, 4> mask) {
  check_kron("kron_linear_backward", x, scale, down, up, Width::kAny);
  check_grad("kron_linear_backward", grad_out, kron_output_sizes(x, scale, up), x, x.scalar_type());
  const typename Backend::Guard guard(x);
  const Tensor flat = flatten_tokens(x), grad = flatten_tokens(grad_out);
  const auto call = plain_call(flat, {scale, down, up}, std::nullopt, 0.0, false);
  return as_tuple(run_backward<Backend>(call, grad, {}, {}, {}, mask[0], false), x, mask);
}

template <typename Backend>
Tensor alore(const Tensor& x, const Tensor& scale, const Tensor& down, const Tensor& up,
             const OptTensor& seed, double dropout_p) {
  check_kron("alore", x, scale, down, up, Width::kResidual);
  check_dropout("alore", x, seed, dropout_p);
  const typename Backend::Guard guard(x);
  const Tensor flat = flatten_tokens(x);
  const auto call = plain_call(flat, {scale, down, up}, seed, dropout_p, true);
  return like_input(run_forward<Backend>(call, {}, {}, {}), x);
}

template <typename Backend>
Grads4 alore_backward(const Tensor& grad_out, const Tensor& x, const Tensor& scale, const Tensor& down,
                      const Tensor& up, const OptTensor& seed, double dropout_p, std::array<bool, 4> mask) {
  check_kron("alore_backward", x, scale, down, up, Width::kResidual);
  check_dropout("alore_backward", x, seed, dropout_p);
  check_grad("alore_backward", grad_out, x.sym_sizes(), x, x.scalar_type());
  const typename Backend::Guard guard(x);
  const Tensor flat = flatten_tokens(x), grad = flatten_tokens(grad_out);
  const auto call = plain_call(flat, {scale, down, up}, seed, dropout_p, true);
  return as_tuple(run_backward<Backend>(call, grad, {}, {}, {}, mask[0], false), x, mask);
}

template <typename Backend>
T4 norm_forward(const char* op, const Tensor& x, const OptTensor& residual, const OptTensor& weight,
                const OptTensor& bias, double eps, const Tensor& scale, const Tensor& down, const Tensor& up,
                const OptTensor& seed, double dropout_p, std::optional<at::ScalarType> out_dtype) {
  check_norm_forward(op, x, residual, weight, bias, eps, scale, down, up, seed, dropout_p, out_dtype);
  const typename Backend::Guard guard(x);
  const Tensor flat = flatten_tokens(x);
  const bool adds = residual.has_value() && residual->defined();
  const Tensor other = adds ? flatten_tokens(*residual) : Tensor();
  const auto statistics = flat.options().dtype(accumulate_type(x.scalar_type()));
  const auto leading = x.sizes().slice(0, x.dim() - 1);
  const Tensor mean = at::empty(leading, statistics), rstd = at::empty(leading, statistics);
  const Tensor sum = adds ? at::empty_like(flat) : Tensor();
  const AloreCall call{flat,
                       other,
                       true,
                       weight,
                       bias,
                       eps,
                       {scale, down, up},
                       seed,
                       dropout_p,
                       true,
                       out_dtype.value_or(x.scalar_type())};
  const Tensor out = run_forward<Backend>(call, sum, mean, rstd);
  return {like_input(out, x), like_input(sum, x, adds), mean, rstd};
}

template <typename Backend>
std::tuple<Tensor, Tensor, Tensor> layer_norm_alore(const Tensor& x, const OptTensor& weight,
                                                    const OptTensor& bias, double eps, const Tensor& scale,
                                                    const Tensor& down, const Tensor& up,
                                                    const OptTensor& seed, double dropout_p,
                                                    std::optional<at::ScalarType> out_dtype) {
  auto [out, sum, mean, rstd] = norm_forward<Backend>("layer_norm_alore", x, std::nullopt, weight, bias, eps,
                                                      scale, down, up, seed, dropout_p, out_dtype);
  return {out, mean, rstd};
}

template <typename Backend>
T4 add_layer_norm_alore(const Tensor& x, const Tensor& residual, const OptTensor& weight,
                        const OptTensor& bias, double eps, const Tensor& scale, const Tensor& down,
                        const Tensor& up, const OptTensor& seed, double dropout_p,
                        std::optional<at::ScalarType> out_dtype) {
  return norm_forward<Backend>("add_layer_norm_alore", x, residual, weight, bias, eps, scale, down, up, seed,
                               dropout_p, out_dtype);
}

// x is the sum where the forward had a residual; grad_sum is the gradient of that sum as an output.
template <typename Backend>
Grads6 layer_norm_alore_backward(const Tensor& grad_out, const Tensor& x, const OptTensor& weight,
                                 const OptTensor& bias, const Tensor& mean, const Tensor& rstd,
                                 const Tensor& scale, const Tensor& down, const Tensor& up,
                                 const OptTensor& seed, double dropout_p, std::array<bool, 6> mask,
                                 const OptTensor& grad_sum) {
  check_norm_backward(grad_out, x, weight, bias, mean, rstd, scale, down, up, seed, dropout_p, grad_sum);
  const bool has_grad_sum = grad_sum.has_value() && grad_sum->defined();
  mask[1] = mask[1] && weight.has_value() && weight->defined();
  mask[2] = mask[2] && bias.has_value() && bias->defined();
  const typename Backend::Guard guard(x);
  const Tensor flat = flatten_tokens(x), grad = flatten_tokens(grad_out);
  const Tensor flat_grad_sum = has_grad_sum ? flatten_tokens(*grad_sum) : Tensor();
  const AloreCall call{flat,
                       Tensor(),
                       true,
                       weight,
                       bias,
                       0.0,
                       {scale, down, up},
                       seed,
                       dropout_p,
                       true,
                       grad_out.scalar_type()};
  const auto grads =
      run_backward<Backend>(call, grad, flat_grad_sum, mean.contiguous().view({flat.size(0)}),
                            rstd.contiguous().view({flat.size(0)}), mask[0], mask[1] || mask[2]);
  return {like_input(grads.x, x, mask[0]),     wanted(mask[1], grads.weight),
          wanted(mask[2], grads.bias),         wanted(mask[3], grads.factors.scale),
          wanted(mask[4], grads.factors.down), wanted(mask[5], grads.factors.up)};
}

// Registers every op of one backend under the current dispatch key.
template <typename Backend>
void register_ops(torch::Library& m) {
  m.impl("kron_linear", kron_linear<Backend>);
  m.impl("kron_linear_backward", kron_linear_backward<Backend>);
  m.impl("alore", alore<Backend>);
  m.impl("alore_backward", alore_backward<Backend>);
  m.impl("layer_norm_alore", layer_norm_alore<Backend>);
  m.impl("add_layer_norm_alore", add_layer_norm_alore<Backend>);
  m.impl("layer_norm_alore_backward", layer_norm_alore_backward<Backend>);
}

}  // namespace alore::ops
