#include "ops/common.h"

#include <ATen/MemoryOverlap.h>

#include <ostream>

namespace alore::ops {

std::ostream& operator<<(std::ostream& out, const OpName& name) {
  out << name.op;
  if (name.member != nullptr) out << ": " << name.member << " " << name.index;
  return out;
}

namespace {

bool is_half(at::ScalarType t) { return t == at::kBFloat16 || t == at::kHalf; }

bool is_supported(at::ScalarType t) { return is_half(t) || t == at::kFloat || t == at::kDouble; }

void check_activation(const OpName& op, const Tensor& x) {
  TORCH_CHECK(is_supported(x.scalar_type()), op, ": x must be float64, float32, bfloat16 or float16, got ",
              x.scalar_type());
  TORCH_CHECK(x.dim() >= 1, op, ": x must have at least one axis, got a scalar");
}

void check_device(const OpName& op, const char* name, const Tensor& t, const Tensor& x) {
  TORCH_CHECK(t.device() == x.device(), op, ": ", name, " must be on x's device ", x.device(), ", got ",
              t.device());
  TORCH_CHECK(t.layout() == at::kStrided, op, ": ", name, " must be a dense tensor, got layout ", t.layout());
}

// Factors are in x's dtype, or in float32 under a 16-bit x.
void check_factor_dtype(const OpName& op, const char* name, at::ScalarType got, at::ScalarType x) {
  TORCH_CHECK(got == x || (is_half(x) && got == at::kFloat), op, ": ", name, " must be ", x,
              is_half(x) ? " (x's dtype) or Float" : " (x's dtype)", ", got ", got);
}

void check_same_dtype(const OpName& op, const char* name, const Tensor& t, const char* other_name,
                      const Tensor& other) {
  TORCH_CHECK(t.scalar_type() == other.scalar_type(), op, ": ", name, " must have ", other_name, "'s dtype ",
              other.scalar_type(), ", got ", t.scalar_type());
}

void check_kron_factors(const OpName& op, const Tensor& scale, const Tensor& down, const Tensor& up) {
  TORCH_CHECK(scale.dim() == 3, op, ": scale must be [num_experts, s_in, s_out], got ", scale.sym_sizes());
  TORCH_CHECK(down.dim() == 3, op, ": down must be [num_experts, p_in, rank], got ", down.sym_sizes());
  TORCH_CHECK(up.dim() == 3, op, ": up must be [num_experts, rank, p_out], got ", up.sym_sizes());
  for (const auto& [name, t] : {std::pair{"scale", &scale}, {"down", &down}, {"up", &up}}) {
    TORCH_CHECK(t->sym_size(0) > 0 && t->sym_size(1) > 0 && t->sym_size(2) > 0, op, ": ", name,
                " must have no empty axis, got ", t->sym_sizes());
  }
  TORCH_CHECK(down.sym_size(0) == scale.sym_size(0) && up.sym_size(0) == scale.sym_size(0), op,
              ": scale, down and up must agree in num_experts (their first axis), got ", scale.sym_size(0),
              ", ", down.sym_size(0), " and ", up.sym_size(0));
  TORCH_CHECK(down.sym_size(2) == up.sym_size(1), op, ": down and up must agree in rank, got down ",
              down.sym_sizes(), " and up ", up.sym_sizes());
  check_same_dtype(op, "down", down, "scale", scale);
  check_same_dtype(op, "up", up, "scale", scale);
}

void check_optional_vector(const OpName& op, const char* name, const OptTensor& v, const c10::SymInt& size,
                           const Tensor& x) {
  if (!v.has_value() || !v->defined()) return;
  TORCH_CHECK(v->dim() == 1 && v->sym_size(0) == size, op, ": ", name, " must be [", size, "], got ",
              v->sym_sizes());
  check_device(op, name, *v, x);
}

void check_lora_factors(const OpName& op, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                        const Tensor& coeff, Coeff rule) {
  TORCH_CHECK(weight.dim() == 2 && weight.sym_size(0) > 0 && weight.sym_size(1) > 0, op,
              ": weight must be [out_features, in_features] with no empty axis, got ", weight.sym_sizes());
  TORCH_CHECK(lora_a.dim() == 2 && lora_a.sym_size(1) == weight.sym_size(1) && lora_a.sym_size(0) > 0, op,
              ": lora_a must be [R, in_features]=[R, ", weight.sym_size(1), "] with R > 0, got ",
              lora_a.sym_sizes());
  const c10::SymInt rank = lora_a.sym_size(0);
  TORCH_CHECK(lora_b.dim() == 2 && lora_b.sym_size(0) == weight.sym_size(0) && lora_b.sym_size(1) == rank, op,
              ": lora_b must be [out_features, R]=[", weight.sym_size(0), ", ", rank, "], got ",
              lora_b.sym_sizes());
  if (rule == Coeff::kPerRow) {
    TORCH_CHECK(coeff.dim() == 1 && coeff.sym_size(0) == rank, op, ": coeff must be [R]=[", rank, "], got ",
                coeff.sym_sizes());
  } else {
    TORCH_CHECK(coeff.dim() == 1 && coeff.sym_size(0) > 0 && rank % coeff.sym_size(0) == 0, op,
                ": coeff must be [num_experts] with num_experts dividing R=", rank, ", got ",
                coeff.sym_sizes());
  }
  check_same_dtype(op, "lora_b", lora_b, "lora_a", lora_a);
  check_same_dtype(op, "coeff", coeff, "lora_a", lora_a);
  check_device(op, "lora_a", lora_a, weight);
  check_device(op, "lora_b", lora_b, weight);
  check_device(op, "coeff", coeff, weight);
}

void check_no_overlap(const OpName& op, const char* name, const Tensor& t) {
  TORCH_CHECK(
      at::has_internal_overlap(t) != at::MemOverlap::Yes, op, ": ", name,
      " must not overlap itself in memory (an expanded tensor cannot be written in place), got strides ",
      t.sym_strides());
}

void check_merge_target(const OpName& op, const Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2, op, ": weight must be [out_features, in_features], got ",
              weight.sym_sizes());
  TORCH_CHECK(is_supported(weight.scalar_type()), op,
              ": weight must be float64, float32, bfloat16 or float16, got ", weight.scalar_type());
  check_no_overlap(op, "weight", weight);
}

void check_named_grad(const OpName& op, const char* name, const Tensor& grad, c10::SymIntArrayRef sizes,
                      const Tensor& like, at::ScalarType dtype) {
  TORCH_CHECK(grad.sym_sizes() == sizes, op, ": ", name, " must be ", sizes, ", got ", grad.sym_sizes());
  TORCH_CHECK(grad.scalar_type() == dtype, op, ": ", name, " must be ", dtype, ", got ", grad.scalar_type());
  check_device(op, name, grad, like);
}

}  // namespace

void check_floating(const OpName& op, const char* name, const Tensor& t) {
  TORCH_CHECK(is_supported(t.scalar_type()), op, ": ", name,
              " must be float64, float32, bfloat16 or float16, got ", t.scalar_type());
}

kernels::DType kernel_dtype(at::ScalarType type) {
  switch (type) {
    case at::kDouble:
      return kernels::DType::kFloat64;
    case at::kFloat:
      return kernels::DType::kFloat32;
    case at::kBFloat16:
      return kernels::DType::kBFloat16;
    case at::kHalf:
      return kernels::DType::kFloat16;
    default:
      TORCH_CHECK(false, "alore_ext: no kernel for dtype ", type);
  }
}

bool is_folding(const Tensor& x, const Tensor& weight) {
  return is_half(x.scalar_type()) && weight.scalar_type() == at::kFloat;
}

at::ScalarType accumulate_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

Tensor flatten_tokens(const Tensor& x) {
  const int64_t width = x.size(-1);
  return x.contiguous().view({width == 0 ? 0 : x.numel() / width, width});
}

void check_kron(const OpName& op, const Tensor& x, const Tensor& scale, const Tensor& down, const Tensor& up,
                Width width_rule) {
  check_activation(op, x);
  check_kron_factors(op, scale, down, up);
  check_factor_dtype(op, "scale", scale.scalar_type(), x.scalar_type());
  check_device(op, "scale", scale, x);
  check_device(op, "down", down, x);
  check_device(op, "up", up, x);
  const c10::SymInt width = scale.sym_size(1) * down.sym_size(1);
  TORCH_CHECK(x.sym_size(-1) == width, op, ": the last axis of x must be s_in * p_in = ", scale.sym_size(1),
              " * ", down.sym_size(1), " = ", width, ", got ", x.sym_sizes());
  if (width_rule == Width::kResidual) {
    const c10::SymInt out = scale.sym_size(2) * up.sym_size(2);
    TORCH_CHECK(out == width, op, ": adds its result to x, so s_out * p_out must be ", width, ", got ",
                scale.sym_size(2), " * ", up.sym_size(2), " = ", out);
  }
}

void check_dropout(const OpName& op, const Tensor& x, const OptTensor& seed, double p) {
  TORCH_CHECK(p >= 0.0 && p < 1.0, op, ": dropout_p must be in [0, 1), got ", p);
  // A seed that no one reads is checked as well: its device takes part in choosing the kernel.
  if (p == 0.0 && !(seed.has_value() && seed->defined())) return;
  TORCH_CHECK(seed.has_value() && seed->defined(), op, ": dropout_p = ", p, " needs a seed tensor, got none");
  TORCH_CHECK(seed->scalar_type() == at::kLong && seed->sym_numel() == 1, op,
              ": seed must be one int64, got ", seed->scalar_type(), " ", seed->sym_sizes());
  check_device(op, "seed", *seed, x);
}

void check_layer_norm(const OpName& op, const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                      double eps, std::optional<at::ScalarType> out_dtype) {
  const c10::SymInt width = x.sym_size(-1);
  check_optional_vector(op, "weight", weight, width, x);
  check_optional_vector(op, "bias", bias, width, x);
  for (const auto& [name, v] : {std::pair{"weight", &weight}, {"bias", &bias}}) {
    if (v->has_value() && (*v)->defined()) check_factor_dtype(op, name, (*v)->scalar_type(), x.scalar_type());
  }
  if (weight.has_value() && weight->defined() && bias.has_value() && bias->defined()) {
    check_same_dtype(op, "bias", *bias, "weight", *weight);
  }
  TORCH_CHECK(eps >= 0.0, op, ": eps must not be negative, got ", eps);
  if (out_dtype.has_value()) {
    TORCH_CHECK(*out_dtype == x.scalar_type() || (x.scalar_type() == at::kFloat && is_half(*out_dtype)), op,
                ": out_dtype must be x's dtype, or 16-bit for a Float x; got ", *out_dtype, " for ",
                x.scalar_type());
  }
}

void check_statistics(const OpName& op, const Tensor& x, const Tensor& mean, const Tensor& rstd) {
  const auto leading = x.sym_sizes().slice(0, x.dim() - 1);
  const auto acc = accumulate_type(x.scalar_type());
  for (const auto& [name, t] : {std::pair{"mean", &mean}, {"rstd", &rstd}}) {
    TORCH_CHECK(t->sym_sizes() == leading, op, ": ", name, " must be ", leading, ", got ", t->sym_sizes());
    TORCH_CHECK(t->scalar_type() == acc, op, ": ", name, " must be ", acc, ", got ", t->scalar_type());
    check_device(op, name, *t, x);
  }
}

void check_norm_forward(const OpName& op, const Tensor& x, const OptTensor& residual, const OptTensor& weight,
                        const OptTensor& bias, double eps, const Tensor& scale, const Tensor& down,
                        const Tensor& up, const OptTensor& seed, double dropout_p,
                        std::optional<at::ScalarType> out_dtype) {
  check_kron(op, x, scale, down, up, Width::kResidual);
  if (residual.has_value() && residual->defined()) {
    TORCH_CHECK(residual->sym_sizes() == x.sym_sizes(), op, ": residual must have x's shape ", x.sym_sizes(),
                ", got ", residual->sym_sizes());
    check_same_dtype(op, "residual", *residual, "x", x);
    check_device(op, "residual", *residual, x);
  }
  check_layer_norm(op, x, weight, bias, eps, out_dtype);
  check_dropout(op, x, seed, dropout_p);
}

void check_norm_backward(const Tensor& grad_out, const Tensor& x, const OptTensor& weight,
                         const OptTensor& bias, const Tensor& mean, const Tensor& rstd, const Tensor& scale,
                         const Tensor& down, const Tensor& up, const OptTensor& seed, double dropout_p,
                         const OptTensor& grad_sum) {
  constexpr const char* op = "layer_norm_alore_backward";
  check_kron(op, x, scale, down, up, Width::kResidual);
  check_layer_norm(op, x, weight, bias, 0.0, std::nullopt);
  check_statistics(op, x, mean, rstd);
  check_dropout(op, x, seed, dropout_p);
  check_norm_grad(op, grad_out, x);
  if (grad_sum.has_value() && grad_sum->defined()) {
    check_named_grad(op, "grad_sum", *grad_sum, x.sym_sizes(), x, x.scalar_type());
  }
}

void check_lora(const OpName& op, const Tensor& x, const Tensor& weight, const OptTensor& bias,
                const Tensor& lora_a, const Tensor& lora_b, const Tensor& coeff, Coeff rule) {
  check_activation(op, x);
  check_device(op, "weight", weight, x);
  check_lora_factors(op, weight, lora_a, lora_b, coeff, rule);
  TORCH_CHECK(x.sym_size(-1) == weight.sym_size(1), op,
              ": the last axis of x must be in_features=", weight.sym_size(1), ", got ", x.sym_sizes());
  TORCH_CHECK(weight.scalar_type() == x.scalar_type() || is_folding(x, weight), op,
              ": weight must have x's dtype ", x.scalar_type(),
              is_half(x.scalar_type()) ? " or Float (which folds)" : "", ", got ", weight.scalar_type());
  check_optional_vector(op, "bias", bias, weight.sym_size(0), x);
  if (bias.has_value() && bias->defined()) check_same_dtype(op, "bias", *bias, "x", x);
  check_factor_dtype(op, "lora_a", lora_a.scalar_type(), x.scalar_type());
}

void check_merge_kron(const OpName& op, const Tensor& weight, const OptTensor& bias, const Tensor& scale,
                      const Tensor& down, const Tensor& up, std::string_view side) {
  check_merge_target(op, weight);
  TORCH_CHECK(side == "before" || side == "after", op, ": side must be \"before\" or \"after\", got \"", side,
              "\"");
  check_kron_factors(op, scale, down, up);
  check_floating(op, "scale", scale);
  check_device(op, "scale", scale, weight);
  check_device(op, "down", down, weight);
  check_device(op, "up", up, weight);
  const bool before = side == "before";
  const c10::SymInt dim = weight.sym_size(before ? 1 : 0);
  const c10::SymInt in = scale.sym_size(1) * down.sym_size(1), out = scale.sym_size(2) * up.sym_size(2);
  TORCH_CHECK(in == dim && out == dim, op, ": the adapter must be square on weight's ",
              before ? "in_features=" : "out_features=", dim, ", got ", in, " -> ", out);
  check_optional_vector(op, "bias", bias, weight.sym_size(0), weight);
  if (bias.has_value() && bias->defined()) {
    check_floating(op, "bias", *bias);
    check_no_overlap(op, "bias", *bias);
  }
}

void check_merge_lora(const OpName& op, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                      const Tensor& coeff) {
  check_merge_target(op, weight);
  check_lora_factors(op, weight, lora_a, lora_b, coeff, Coeff::kPerRow);
  check_floating(op, "lora_a", lora_a);
}

void check_grad(const OpName& op, const Tensor& grad_out, c10::SymIntArrayRef sizes, const Tensor& like,
                at::ScalarType dtype) {
  check_named_grad(op, "grad_out", grad_out, sizes, like, dtype);
}

void check_norm_grad(const OpName& op, const Tensor& grad_out, const Tensor& x) {
  const auto got = grad_out.scalar_type();
  TORCH_CHECK(got == x.scalar_type() || (x.scalar_type() == at::kFloat && is_half(got)), op,
              ": grad_out must be ", x.scalar_type(), " (x's dtype), or 16-bit for a Float x; got ", got);
  check_grad(op, grad_out, x.sym_sizes(), x, got);
}

std::vector<c10::SymInt> kron_output_sizes(const Tensor& x, const Tensor& scale, const Tensor& up) {
  std::vector<c10::SymInt> sizes = x.sym_sizes().vec();
  sizes.back() = scale.sym_size(2) * up.sym_size(2);
  return sizes;
}

std::vector<c10::SymInt> lora_output_sizes(const Tensor& x, const Tensor& weight) {
  std::vector<c10::SymInt> sizes = x.sym_sizes().vec();
  sizes.back() = weight.sym_size(0);
  return sizes;
}

bool is_square(const Tensor& scale, const Tensor& down, const Tensor& up) {
  return scale.size(1) == scale.size(2) && down.size(1) == up.size(2);
}

kernels::AloreShape alore_shape(int64_t num_tokens, at::ScalarType input, at::ScalarType output,
                                const Tensor& scale, const Tensor& down, bool norm, at::ScalarType affine,
                                bool add_base) {
  return {.num_tokens = num_tokens,
          .num_experts = scale.size(0),
          .num_blocks = scale.size(1),
          .block_dim = down.size(1),
          .rank = down.size(2),
          .input = kernel_dtype(input),
          .output = kernel_dtype(output),
          .factor = kernel_dtype(scale.scalar_type()),
          .affine = kernel_dtype(affine),
          .norm = norm,
          .add_base = add_base};
}

kernels::KronShape kron_shape(const Tensor& x2d, const Tensor& scale, const Tensor& down, const Tensor& up) {
  return {.num_tokens = x2d.size(0),
          .num_experts = scale.size(0),
          .s_in = scale.size(1),
          .s_out = scale.size(2),
          .p_in = down.size(1),
          .p_out = up.size(2),
          .rank = down.size(2),
          .activation = kernel_dtype(x2d.scalar_type()),
          .factor = kernel_dtype(scale.scalar_type())};
}

}  // namespace alore::ops
