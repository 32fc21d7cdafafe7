// The ops that take one adapter a sample, between their checks and what runs them. Axis 0 of x is the sample;
// index names its adapter, -1 none. Inference only: autograd refuses them.
#pragma once

#include "ops/backend.h"
#include "ops/dispatch.h"

namespace alore::ops {

// The whole call, each adapter as the single op checks it. Errors name the adapter. The index's values are
// not looked at: on CUDA they could not be without waiting for the device.
void check_kron_grouped(const char* op, const Tensor& x, TensorList scale, TensorList down, TensorList up,
                        const Tensor& index);
void check_norm_grouped(const Tensor& x, const OptTensor& weight, const OptTensor& bias, double eps,
                        TensorList scale, TensorList down, TensorList up, const Tensor& index,
                        std::optional<at::ScalarType> out_dtype);
void check_lora_grouped(const Tensor& x, const Tensor& weight, const OptTensor& bias, TensorList lora_a,
                        TensorList lora_b, TensorList coeff, const Tensor& index);

// A checked call of a Kronecker op.
struct KronGrouped {
  const char* op;
  Tensor x;  // [num_samples, tokens, embed_dim], contiguous
  TensorList scale, down, up;
  Tensor index;       // contiguous
  bool norm = false;  // layer norm in front, with weight, bias and eps
  OptTensor weight, bias;
  double eps = 0.0;
  bool add_base = true;  // false: the Kronecker map alone
  at::ScalarType out_dtype;

  int64_t num_adapters() const { return static_cast<int64_t>(scale.size()); }
};

// A checked call of the low-rank linear.
struct LoraGrouped {
  const char* op;
  Tensor x;  // [num_samples, tokens, in_features], contiguous
  const Tensor& weight;
  OptTensor bias;  // never an undefined tensor
  TensorList lora_a, lora_b, coeff;
  Tensor index;  // contiguous
};

// x as [num_samples, tokens, width], contiguous. Works for 0 samples and 0 tokens.
Tensor flatten_samples(const Tensor& x);

// From ATen's batched products on any device, without reading the index on the host: factors are gathered by
// sample, padded with zeros to the largest. The Kronecker maps take one pass for every num_blocks that
// occurs.
Tensor compose_kron_grouped(const KronGrouped& call);
Tensor compose_lora_grouped(const LoraGrouped& call);

// ---- The ops, over a backend's Guard, kron and lora
// -------------------------------------------------------------

template <typename Backend>
Tensor run_kron_grouped(const KronGrouped& call, const Tensor& x) {
  const typename Backend::Guard guard(x);
  return Backend::kron(call).view(x.sizes());
}

template <typename Backend>
Tensor kron_linear_grouped(const Tensor& x, TensorList scale, TensorList down, TensorList up,
                           const Tensor& index) {
  constexpr const char* op = "kron_linear_grouped";
  check_kron_grouped(op, x, scale, down, up, index);
  return run_kron_grouped<Backend>({.op = op,
                                    .x = flatten_samples(x),
                                    .scale = scale,
                                    .down = down,
                                    .up = up,
                                    .index = index.contiguous(),
                                    .add_base = false,
                                    .out_dtype = x.scalar_type()},
                                   x);
}

template <typename Backend>
Tensor alore_grouped(const Tensor& x, TensorList scale, TensorList down, TensorList up, const Tensor& index) {
  constexpr const char* op = "alore_grouped";
  check_kron_grouped(op, x, scale, down, up, index);
  return run_kron_grouped<Backend>({.op = op,
                                    .x = flatten_samples(x),
                                    .scale = scale,
                                    .down = down,
                                    .up = up,
                                    .index = index.contiguous(),
                                    .out_dtype = x.scalar_type()},
                                   x);
}

template <typename Backend>
Tensor layer_norm_alore_grouped(const Tensor& x, const OptTensor& weight, const OptTensor& bias, double eps,
                                TensorList scale, TensorList down, TensorList up, const Tensor& index,
                                std::optional<at::ScalarType> out_dtype) {
  check_norm_grouped(x, weight, bias, eps, scale, down, up, index, out_dtype);
  return run_kron_grouped<Backend>({.op = "layer_norm_alore_grouped",
                                    .x = flatten_samples(x),
                                    .scale = scale,
                                    .down = down,
                                    .up = up,
                                    .index = index.contiguous(),
                                    .norm = true,
                                    .weight = weight,
                                    .bias = bias,
                                    .eps = eps,
                                    .out_dtype = out_dtype.value_or(x.scalar_type())},
                                   x);
}

template <typename Backend>
Tensor masked_lora_linear_grouped(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                  TensorList lora_a, TensorList lora_b, TensorList coeff,
                                  const Tensor& index) {
  check_lora_grouped(x, weight, bias, lora_a, lora_b, coeff, index);
  const typename Backend::Guard guard(x);
  const Tensor out = Backend::lora({.op = "masked_lora_linear_grouped",
                                    .x = flatten_samples(x),
                                    .weight = weight,
                                    .bias = bias.has_value() && bias->defined() ? bias : std::nullopt,
                                    .lora_a = lora_a,
                                    .lora_b = lora_b,
                                    .coeff = coeff,
                                    .index = index.contiguous()});
  return out.view(C10_AS_INTARRAYREF_SLOW(lora_output_sizes(x, weight)));
}

template <typename Backend>
void register_grouped(torch::Library& m) {
  m.impl("kron_linear_grouped", kron_linear_grouped<Backend>);
  m.impl("alore_grouped", alore_grouped<Backend>);
  m.impl("layer_norm_alore_grouped", layer_norm_alore_grouped<Backend>);
  m.impl("masked_lora_linear_grouped", masked_lora_linear_grouped<Backend>);
}

}  // namespace alore::ops
