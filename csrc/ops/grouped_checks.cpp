// Checks of the ops that take one adapter a sample, their shapes without data, and what autograd must know of
// them.
#include "ops/autograd.h"
#include "ops/grouped.h"

namespace alore::ops {
namespace {

void check_length(const char* op, const char* name, size_t got, const char* of, size_t expected) {
  TORCH_CHECK(got == expected, op, ": ", name, " must have as many adapters as ", of, ", ", expected,
              ", got ", got);
}

void check_index(const char* op, const Tensor& x, const Tensor& index) {
  TORCH_CHECK(x.dim() >= 2, op, ": x must be [batch, ..., features], got ", x.sym_sizes());
  TORCH_CHECK(index.scalar_type() == at::kLong, op, ": index must be int64, got ", index.scalar_type());
  TORCH_CHECK(index.dim() == 1 && index.sym_size(0) == x.sym_size(0), op, ": index must be [batch]=[",
              x.sym_size(0), "], one adapter a sample, got ", index.sym_sizes());
  TORCH_CHECK(index.device() == x.device(), op, ": index must be on x's device ", x.device(), ", got ",
              index.device());
}

// Square block by block, so that a sample's result is as wide as the sample whatever its adapter.
void check_square(const OpName& op, const Tensor& scale, const Tensor& down, const Tensor& up) {
  TORCH_CHECK(scale.sym_size(1) == scale.sym_size(2), op, ": scale must be [num_experts, s, s], got ",
              scale.sym_sizes());
  TORCH_CHECK(down.sym_size(1) == up.sym_size(2), op,
              ": down and up must agree in embed_dim / s (down's middle axis, up's last), got down ",
              down.sym_sizes(), " and up ", up.sym_sizes());
}

}  // namespace

void check_kron_grouped(const char* op, const Tensor& x, TensorList scale, TensorList down, TensorList up,
                        const Tensor& index) {
  check_index(op, x, index);
  TORCH_CHECK(!scale.empty(), op, ": scale must have at least one adapter");
  check_length(op, "down", down.size(), "scale", scale.size());
  check_length(op, "up", up.size(), "scale", scale.size());
  for (size_t i = 0; i < scale.size(); ++i) {
    const OpName name(op, "adapter", i);
    check_kron(name, x, scale[i], down[i], up[i], Width::kAny);
    check_square(name, scale[i], down[i], up[i]);
  }
}

void check_norm_grouped(const Tensor& x, const OptTensor& weight, const OptTensor& bias, double eps,
                        TensorList scale, TensorList down, TensorList up, const Tensor& index,
                        std::optional<at::ScalarType> out_dtype) {
  constexpr const char* op = "layer_norm_alore_grouped";
  check_kron_grouped(op, x, scale, down, up, index);
  check_layer_norm(op, x, weight, bias, eps, out_dtype);
}

void check_lora_grouped(const Tensor& x, const Tensor& weight, const OptTensor& bias, TensorList lora_a,
                        TensorList lora_b, TensorList coeff, const Tensor& index) {
  constexpr const char* op = "masked_lora_linear_grouped";
  check_index(op, x, index);
  TORCH_CHECK(!lora_a.empty(), op, ": lora_a must have at least one adapter");
  check_length(op, "lora_b", lora_b.size(), "lora_a", lora_a.size());
  check_length(op, "coeff", coeff.size(), "lora_a", lora_a.size());
  for (size_t i = 0; i < lora_a.size(); ++i) {
    check_lora({op, "adapter", i}, x, weight, bias, lora_a[i], lora_b[i], coeff[i], Coeff::kPerRow);
  }
}

namespace {

// ---- Meta

Tensor empty(c10::SymIntArrayRef sizes, const Tensor& like, at::ScalarType dtype) {
  return at::empty_symint(sizes, like.options().dtype(dtype));
}

Tensor kron_linear_grouped_meta(const Tensor& x, TensorList scale, TensorList down, TensorList up,
                                const Tensor& index) {
  check_kron_grouped("kron_linear_grouped", x, scale, down, up, index);
  return empty(x.sym_sizes(), x, x.scalar_type());
}

Tensor alore_grouped_meta(const Tensor& x, TensorList scale, TensorList down, TensorList up,
                          const Tensor& index) {
  check_kron_grouped("alore_grouped", x, scale, down, up, index);
  return empty(x.sym_sizes(), x, x.scalar_type());
}

Tensor layer_norm_alore_grouped_meta(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                     double eps, TensorList scale, TensorList down, TensorList up,
                                     const Tensor& index, std::optional<at::ScalarType> out_dtype) {
  check_norm_grouped(x, weight, bias, eps, scale, down, up, index, out_dtype);
  return empty(x.sym_sizes(), x, out_dtype.value_or(x.scalar_type()));
}

Tensor masked_lora_linear_grouped_meta(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                       TensorList lora_a, TensorList lora_b, TensorList coeff,
                                       const Tensor& index) {
  check_lora_grouped(x, weight, bias, lora_a, lora_b, coeff, index);
  return empty(lora_output_sizes(x, weight), x, x.scalar_type());
}

// ---- Autograd

template <typename... Tensors>
void refuse_recording(const char* op, const Tensors&... tensors) {
  TORCH_CHECK(
      !any_requires_grad(tensors...), op,
      ": is for inference and has no gradient, but an input requires one; call it under torch.no_grad() or "
      "torch.inference_mode()");
}

Tensor kron_linear_grouped_autograd(const Tensor& x, TensorList scale, TensorList down, TensorList up,
                                    const Tensor& index) {
  refuse_recording("kron_linear_grouped", x, scale, down, up);
  const at::AutoDispatchBelowADInplaceOrView below;
  return kron_linear_grouped_op().call(x, scale, down, up, index);
}

Tensor alore_grouped_autograd(const Tensor& x, TensorList scale, TensorList down, TensorList up,
                              const Tensor& index) {
  refuse_recording("alore_grouped", x, scale, down, up);
  const at::AutoDispatchBelowADInplaceOrView below;
  return alore_grouped_op().call(x, scale, down, up, index);
}

Tensor layer_norm_alore_grouped_autograd(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                         double eps, TensorList scale, TensorList down, TensorList up,
                                         const Tensor& index, std::optional<at::ScalarType> out_dtype) {
  refuse_recording("layer_norm_alore_grouped", x, weight, bias, scale, down, up);
  const at::AutoDispatchBelowADInplaceOrView below;
  return layer_norm_alore_grouped_op().call(x, weight, bias, eps, scale, down, up, index, out_dtype);
}

Tensor masked_lora_linear_grouped_autograd(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                           TensorList lora_a, TensorList lora_b, TensorList coeff,
                                           const Tensor& index) {
  refuse_recording("masked_lora_linear_grouped", x, weight, bias, lora_a, lora_b, coeff);
  const at::AutoDispatchBelowADInplaceOrView below;
  return masked_lora_linear_grouped_op().call(x, weight, bias, lora_a, lora_b, coeff, index);
}

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, Meta, m) {
  using namespace alore::ops;
  m.impl("kron_linear_grouped", kron_linear_grouped_meta);
  m.impl("alore_grouped", alore_grouped_meta);
  m.impl("layer_norm_alore_grouped", layer_norm_alore_grouped_meta);
  m.impl("masked_lora_linear_grouped", masked_lora_linear_grouped_meta);
}

TORCH_LIBRARY_IMPL(alore_ext, Autograd, m) {
  using namespace alore::ops;
  m.impl("kron_linear_grouped", kron_linear_grouped_autograd);
  m.impl("alore_grouped", alore_grouped_autograd);
  m.impl("layer_norm_alore_grouped", layer_norm_alore_grouped_autograd);
  m.impl("masked_lora_linear_grouped", masked_lora_linear_grouped_autograd);
}
