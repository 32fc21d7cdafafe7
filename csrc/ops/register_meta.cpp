// Shapes and dtypes without data, for FakeTensor, torch.compile and torch.export. The checks are the real
// kernels' own.
#include "ops/merge.h"
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

T4 norm_forward_meta(const char* op, const Tensor& x, const OptTensor& residual, const OptTensor& weight,
                     const OptTensor& bias, double eps, const Tensor& scale, const Tensor& down,
                     const Tensor& up, const OptTensor& seed, double dropout_p,
                     std::optional<at::ScalarType> out_dtype) {
  check_norm_forward(op, x, residual, weight, bias, eps, scale, down, up, seed, dropout_p, out_dtype);
  const auto leading = x.sym_sizes().slice(0, x.dim() - 1);
  const auto acc = accumulate_type(x.scalar_type());
  return {empty(x.sym_sizes(), x, out_dtype.value_or(x.scalar_type())), grad_like(residual.has_value(), x),
          empty(leading, x, acc), empty(leading, x, acc)};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_alore_meta(const Tensor& x, const OptTensor& weight,
                                                         const OptTensor& bias, double eps,
                                                         const Tensor& scale, const Tensor& down,
                                                         const Tensor& up, const OptTensor& seed,
                                                         double dropout_p,
                                                         std::optional<at::ScalarType> out_dtype) {
  auto [out, sum, mean, rstd] = norm_forward_meta("layer_norm_alore", x, std::nullopt, weight, bias, eps,
                                                  scale, down, up, seed, dropout_p, out_dtype);
  return {out, mean, rstd};
}

T4 add_layer_norm_alore_meta(const Tensor& x, const Tensor& residual, const OptTensor& weight,
                             const OptTensor& bias, double eps, const Tensor& scale, const Tensor& down,
                             const Tensor& up, const OptTensor& seed, double dropout_p,
                             std::optional<at::ScalarType> out_dtype) {
  return norm_forward_meta("add_layer_norm_alore", x, residual, weight, bias, eps, scale, down, up, seed,
                           dropout_p, out_dtype);
}

Grads6 layer_norm_alore_backward_meta(const Tensor& grad_out, const Tensor& x, const OptTensor& weight,
                                      const OptTensor& bias, const Tensor& mean, const Tensor& rstd,
                                      const Tensor& scale, const Tensor& down, const Tensor& up,
                                      const OptTensor& seed, double dropout_p, std::array<bool, 6> mask,
                                      const OptTensor& grad_sum) {
  check_norm_backward(grad_out, x, weight, bias, mean, rstd, scale, down, up, seed, dropout_p, grad_sum);
  return {grad_like(mask[0], x),     grad_like(mask[1], weight), grad_like(mask[2], bias),
          grad_like(mask[3], scale), grad_like(mask[4], down),   grad_like(mask[5], up)};
}

void merge_kron_meta(const Tensor& weight, const OptTensor& bias, const Tensor& scale, const Tensor& down,
                     const Tensor& up, std::string_view side) {
  check_merge_kron("merge_kron_", weight, bias, scale, down, up, side);
}

void merge_lora_meta(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, const Tensor& coeff) {
  check_merge_lora("merge_lora_", weight, lora_a, lora_b, coeff);
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
  m.impl("add_layer_norm_alore", add_layer_norm_alore_meta);
  m.impl("layer_norm_alore_backward", layer_norm_alore_backward_meta);
  m.impl("merge_kron_", merge_kron_meta);
  m.impl("merge_lora_", merge_lora_meta);
  m.impl("merge_kron_grouped_", check_merge_kron_grouped);
  m.impl("merge_lora_grouped_", check_merge_lora_grouped);
}
