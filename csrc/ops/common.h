// Shared by the ops: what a call's tensors must look like, and what they become before a kernel sees them.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

#include <iosfwd>
#include <string_view>

#include "kernels/alore.h"
#include "kernels/plan.h"

namespace alore::ops {

using at::Tensor;
using at::TensorList;
using OptTensor = std::optional<Tensor>;
using OptTensorList = std::optional<TensorList>;
using T3 = std::tuple<Tensor, Tensor, Tensor>;
using T4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using T6 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using T7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using T8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Strings = c10::List<std::string>;

kernels::DType kernel_dtype(at::ScalarType type);

// float64 for float64, else float32.
at::ScalarType accumulate_type(at::ScalarType type);

// Never an undefined tensor.
inline OptTensor given(const OptTensor& t) { return t.has_value() && t->defined() ? t : std::nullopt; }

// A float32 weight under 16-bit activations: the update is folded into it before it is rounded.
bool is_folding(const Tensor& x, const Tensor& weight);

// x flattened to [num_tokens, x.size(-1)], contiguous. Works for 0 tokens.
Tensor flatten_tokens(const Tensor& x);

// ---- Checks: the same on CPU, CUDA and Meta, so that a call which fails on one fails on all
// -----------------------

// What errors call a call: the op and, where it takes lists, one of their members. It becomes text only where
// a check fails.
struct OpName {
  const char* op;
  const char* member = nullptr;  // "entry", "adapter"
  size_t index = 0;

  OpName(const char* name) : op(name) {}
  OpName(const char* name, const char* of, size_t which) : op(name), member(of), index(which) {}
};
std::ostream& operator<<(std::ostream& out, const OpName& name);

// A residual map (alore, layer_norm_alore) must be as wide at its output as at its input.
enum class Width { kAny, kResidual };

void check_floating(const OpName& op, const char* name, const Tensor& t);
void check_kron(const OpName& op, const Tensor& x, const Tensor& scale, const Tensor& down, const Tensor& up,
                Width width);
void check_dropout(const OpName& op, const Tensor& x, const OptTensor& seed, double p);
void check_layer_norm(const OpName& op, const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                      double eps, std::optional<at::ScalarType> out_dtype);
// The norm's statistics as its forward returned them: x's leading axes, accumulate type.
void check_statistics(const OpName& op, const Tensor& x, const Tensor& mean, const Tensor& rstd);
// A whole call of layer_norm_alore or add_layer_norm_alore (with a residual), and of their backward.
void check_norm_forward(const OpName& op, const Tensor& x, const OptTensor& residual, const OptTensor& weight,
                        const OptTensor& bias, double eps, const Tensor& scale, const Tensor& down,
                        const Tensor& up, const OptTensor& seed, double dropout_p,
                        std::optional<at::ScalarType> out_dtype);
void check_norm_backward(const Tensor& grad_out, const Tensor& x, const OptTensor& weight,
                         const OptTensor& bias, const Tensor& mean, const Tensor& rstd, const Tensor& scale,
                         const Tensor& down, const Tensor& up, const OptTensor& seed, double dropout_p,
                         const OptTensor& grad_sum);
void check_merge_kron(const OpName& op, const Tensor& weight, const OptTensor& bias, const Tensor& scale,
                      const Tensor& down, const Tensor& up, std::string_view side);
void check_merge_lora(const OpName& op, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                      const Tensor& coeff);
// Whether coeff has an entry for every rank row, or for every expert (R / num_experts rows).
enum class Coeff { kPerRow, kPerExpert };

void check_lora(const OpName& op, const Tensor& x, const Tensor& weight, const OptTensor& bias,
                const Tensor& lora_a, const Tensor& lora_b, const Tensor& coeff, Coeff rule);

void check_mask_p(const OpName& op, double p);
// grad_out and what the forward of a low-rank linear kept; coeff is per expert where there is a mask.
void check_lora_backward(const OpName& op, const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                         const Tensor& lora_a, const Tensor& lora_b, const Tensor& coeff,
                         const OptTensor& mask, const Tensor& code, const Tensor& operand);

// grad_out must look like the forward's output.
void check_grad(const OpName& op, const Tensor& grad_out, c10::SymIntArrayRef sizes, const Tensor& like,
                at::ScalarType dtype);

// The same for layer_norm_alore, whose output may be narrower than a float32 x.
void check_norm_grad(const OpName& op, const Tensor& grad_out, const Tensor& x);

// x's sizes with the last one replaced by that of the Kronecker map's output.
std::vector<c10::SymInt> kron_output_sizes(const Tensor& x, const Tensor& scale, const Tensor& up);
std::vector<c10::SymInt> lora_output_sizes(const Tensor& x, const Tensor& weight);

// Whether a Kronecker map is square block by block, as ALoRE's is; only then has it an AloreShape.
bool is_square(const Tensor& scale, const Tensor& down, const Tensor& up);
kernels::AloreShape alore_shape(int64_t num_tokens, at::ScalarType input, at::ScalarType output,
                                const Tensor& scale, const Tensor& down, bool norm, at::ScalarType affine,
                                bool add_base);

kernels::KronShape kron_shape(const Tensor& x2d, const Tensor& scale, const Tensor& down, const Tensor& up);

}  // namespace alore::ops
