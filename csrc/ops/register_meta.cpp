// Shapes and dtypes without data, for FakeTensor, torch.compile and torch.export. The checks are the real
// kernels' own.
#include "ops/ops.h"

namespace alore::ops {
namespace {

Tensor empty(c10::SymIntArrayRef sizes, const Tensor& like, at::ScalarType dtype) {
  return at::empty_symint(sizes, like.options().dtype(dtype));
}

Tensor empty(c10::SymIntArrayRef sizes, const Tensor& like) { return empty(sizes, like, like.scalar_type()); }

Tensor grad_like(bool yes, const Tensor& t) { return yes ? empty(t.sym_sizes(), t) : Tensor(); }

Tensor grad_like(bool yes, const OptTensor& t) {
  return yes && t.has_value() && t->defined() ? grad_like(true, *t) : Tensor();
}

Tensor kron_linear_meta(const Tensor& x, const Tensor& scale, const Tensor& down, const Tensor& up) {
  check_kron("kron_linear", x, scale, down, up, Width::kAny);
  return empty(kron_output_sizes(x, scale, up), x);
}

Grads4 kron_linear_backward_meta(const Tensor& grad_out, const Tensor& x, const Tensor& scale,
                                 const Tensor& down, const Tensor& up, std::array<bool, 4> mask) {
  check_kron("kron_linear_backward", x, scale, down, up, Width::kAny);
  check_grad("kron_linear_backward", grad_out, kron_output_sizes(x, scale, up), x, x.scalar_type());
  return {grad_like(mask[0], x), grad_like(mask[1], scale), grad_like(mask[2], down), grad_like(mask[3], up)};
}

Tensor alore_meta(const Tensor& x, const Tensor& scale, const Tensor& down, const Tensor& up,
                  const OptTensor& seed, double dropout_p) {
  check_kron("alore", x, scale, down, up, Width::kResidual);
  check_dropout("alore", x, seed, dropout_p);
  return empty(x.sym_sizes(), x);
}

Grads4 alore_backward_meta(const Tensor& grad_out, const Tensor& x, const Tensor& scale, const Tensor& down,
                           const Tensor& up, const OptTensor& seed, double dropout_p,
                           std::array<bool, 4> mask) {
  check_kron("alore_backward", x, scale, down, up, Width::kResidual);
  check_dropout("alore_backward", x, seed, dropout_p);
  check_grad("alore_backward", grad_out, x.sym_sizes(), x, x.scalar_type());
  return {grad_like(mask[0], x), grad_like(mask[1], scale), grad_like(mask[2], down), grad_like(mask[3], up)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_alore_meta(const Tensor& x, const OptTensor& weight,
                                                         const OptTensor& bias, double eps,
                                                         const Tensor& scale, const Tensor& down,
                                                         const Tensor& up, const OptTensor& seed,
                                                         double dropout_p,
                                                         std::optional<at::ScalarType> out_dtype) {
  check_kron("layer_norm_alore", x, scale, down, up, Width::kResidual);
  check_layer_norm("layer_norm_alore", x, weight, bias, eps, out_dtype);
  check_dropout("layer_norm_alore", x, seed, dropout_p);
  const auto leading = x.sym_sizes().slice(0, x.dim() - 1);
  const auto acc = accumulate_type(x.scalar_type());
  return {empty(x.sym_sizes(), x, out_dtype.value_or(x.scalar_type())), empty(leading, x, acc),
          empty(leading, x, acc)};
}

Grads6 layer_norm_alore_backward_meta(const Tensor& grad_out, const Tensor& x, const OptTensor& weight,
                                      const OptTensor& bias, const Tensor& mean, const Tensor& rstd,
                                      const Tensor& scale, const Tensor& down, const Tensor& up,
                                      const OptTensor& seed, double dropout_p, std::array<bool, 6> mask) {
  check_kron("layer_norm_alore_backward", x, scale, down, up, Width::kResidual);
  check_layer_norm("layer_norm_alore_backward", x, weight, bias, 0.0, std::nullopt);
  check_statistics("layer_norm_alore_backward", x, mean, rstd);
  check_dropout("layer_norm_alore_backward", x, seed, dropout_p);
  check_norm_grad("layer_norm_alore_backward", grad_out, x);
  return {grad_like(mask[0], x),     grad_like(mask[1], weight), grad_like(mask[2], bias),
          grad_like(mask[3], scale), grad_like(mask[4], down),   grad_like(mask[5], up)};
}

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, Meta, m) {
  using namespace alore::ops;
  m.impl("kron_linear", kron_linear_meta);
  m.impl("kron_linear_backward", kron_linear_backward_meta);
  m.impl("alore", alore_meta);
  m.impl("alore_backward", alore_backward_meta);
  m.impl("layer_norm_alore", layer_norm_alore_meta);
  m.impl("layer_norm_alore_backward", layer_norm_alore_backward_meta);
  m.impl("merge_kron_", check_merge_kron);
  m.impl("merge_lora_", check_merge_lora);
}
