// layer_norm_mlae_linear on CUDA: fused where a kernel takes the shape, else composed.
#include "ops/norm_lora.h"

#include "ops/backend_cuda.h"
#include "ops/lora_operands.h"

namespace alore::ops {
namespace {

kernels::AloreNormArgs norm_args(const NormLoraCall& call, const OptTensor& weight, const OptTensor& bias) {
  return {read(weight), read(bias), static_cast<float>(call.eps)};
}

float* floats(const Tensor& t) { return static_cast<float*>(write(t)); }

// [x | code] and [W | Bc] in one product; see kernels/norm_lora.h.
NormLoraOutputs forward_fused(const NormLoraCall& call, const kernels::NormLoraShape& shape,
                              const kernels::NormLoraPlan& plan, double mask_p, bool training) {
  const Tensor x = dense_aligned(flatten_tokens(call.x)), weight = dense_aligned(call.weight);
  const OptTensor norm_weight = contiguous(call.norm_weight), norm_bias = contiguous(call.norm_bias);
  const auto& s = shape.linear;
  const int64_t tokens = s.num_tokens, width = plan.linear.code_width;
  const auto leading = call.x.sizes().slice(0, call.x.dim() - 1);
  const auto sized = [&](int64_t last) {
    auto sizes = leading.vec();
    sizes.push_back(last);
    return sizes;
  };
  LoraMask mask{.draw = training && mask_p > 0.0, .p = mask_p};
  mask.drawn = at::empty(call.coeff.sizes(), call.coeff.options().dtype(at::kFloat));
  const auto sums = x.options().dtype(at::kFloat);
  const Tensor extended = at::empty(sized(s.in_features + width), x.options());
  NormLoraOutputs o{{},
                    extended.narrow(-1, 0, s.in_features),
                    at::empty(sized(width), x.options()),
                    at::empty({kernels::lora_operand_elements(s)}, x.options()),
                    mask.drawn,
                    at::empty(leading, sums),
                    at::empty(leading, sums)};
  const LoraOperands operands(LoraCall(x, weight, call.bias, call.lora_a, call.lora_b, call.coeff), mask);
  const kernels::CudaContext context = stream_context();
  const Tensor extended_weight = at::empty({s.out_features, s.in_features + width}, weight.options());
  kernels::norm_lora_forward(context, shape, plan,
                             {.x = read(x),
                              .norm = norm_args(call, norm_weight, norm_bias),
                              .factors = operands.factors(),
                              .coefficients = operands.coefficients,
                              .weight = read(weight),
                              .extended = write(extended),
                              .extended_weight = write(extended_weight),
                              .packed = write(o.operand),
                              .code = write(o.code),
                              .mean = floats(o.mean),
                              .rstd = floats(o.rstd)});
  o.out = at::linear(extended.view({tokens, s.in_features + width}), extended_weight, call.bias)
              .view(sized(s.out_features));
  return o;
}

Grads8 backward_fused(const NormLoraCall& call, const kernels::NormLoraShape& shape,
                      const kernels::NormLoraPlan& plan, const NormLoraSaved& saved, Mask8 wanted) {
  const auto& s = shape.linear;
  const Tensor x = dense_aligned(flatten_tokens(call.x)),
               grad_out = dense_aligned(flatten_tokens(saved.grad_out));
  const Tensor code = dense_aligned(saved.code), packed = dense_aligned(saved.operand);
  const OptTensor norm_weight = contiguous(call.norm_weight), norm_bias = contiguous(call.norm_bias);
  LoraMask mask;
  mask.given = saved.mask.contiguous();
  const LoraOperands operands(LoraCall(x, call.weight, std::nullopt, call.lora_a, call.lora_b, call.coeff),
                              mask);
  const Tensor grad_a = at::empty(call.lora_a.sizes(), call.lora_a.options()),
               grad_b = at::empty(call.lora_b.sizes(), call.lora_b.options()),
               grad_coeff = at::empty(call.coeff.sizes(), call.coeff.options());
  const Tensor grad_code = at::empty({s.num_tokens, plan.linear.code_width}, x.options());
  const Tensor workspace = bytes(plan.workspace_bytes, x);
  const Tensor mean = saved.mean.contiguous(), rstd = saved.rstd.contiguous();
  const kernels::CudaContext context = stream_context();
  kernels::NormLoraBackwardArgs args{.grad_out = read(grad_out),
                                     .x = read(x),
                                     .norm = norm_args(call, norm_weight, norm_bias),
                                     .mean = static_cast<const float*>(read(mean)),
                                     .rstd = static_cast<const float*>(read(rstd)),
                                     .factors = operands.factors(),
                                     .coefficients = operands.coefficients,
                                     .packed = read(packed),
                                     .code = read(code),
                                     .grad_code = write(grad_code),
                                     .gradients = {write(grad_a), write(grad_b), write(grad_coeff)},
                                     .workspace = write(workspace)};
  kernels::norm_lora_output_backward(context, shape, plan, args);
  Tensor grad_x, grad_normalised;
  if (wanted[0]) {
    grad_normalised = at::mm(grad_out, call.weight);
    if (saved.grad_normalised.defined()) grad_normalised.add_(flatten_tokens(saved.grad_normalised));
    grad_x = at::empty_like(x);
    args.grad_normalised = read(grad_normalised);
    args.grad_x = write(grad_x);
  }
  kernels::norm_lora_backward(context, shape, plan, args);
  Grads8 grads;
  if (wanted[0]) grads[0] = grad_x.view(call.x.sizes());
  if (wanted[4]) grads[4] = grad_out.sum(0);
  if (wanted[5]) grads[5] = grad_a;
  if (wanted[6]) grads[6] = grad_b;
  if (wanted[7]) grads[7] = grad_coeff;
  return grads;
}

struct NormLoraCuda {
  static T7 forward(const Tensor& x, const OptTensor& norm_weight, const OptTensor& norm_bias, double eps,
                    const Tensor& weight, const OptTensor& bias, const Tensor& lora_a, const Tensor& lora_b,
                    const Tensor& coeff, double mask_p, bool training) {
    const CudaBackend::Guard guard(x);
    return layer_norm_mlae_linear(x, norm_weight, norm_bias, eps, weight, bias, lora_a, lora_b, coeff, mask_p,
                                  training, [](const NormLoraCall& call, double mask_p, bool training) {
                                    const auto shape =
                                        norm_lora_shape(call, call.x.numel() / call.x.size(-1));
                                    const auto plan = kernels::plan_norm_lora(shape, device_limits());
                                    if (!plan.fused || shape.linear.num_tokens == 0)
                                      return compose_norm_lora(call, mask_p, training);
                                    return forward_fused(call, shape, plan, mask_p, training);
                                  });
  }

  static T8 backward(const Tensor& grad_out, const OptTensor& grad_normalised, const Tensor& x,
                     const OptTensor& norm_weight, const OptTensor& norm_bias, double eps, const Tensor& mean,
                     const Tensor& rstd, const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                     const Tensor& coeff, const Tensor& mask, const Tensor& code, const Tensor& operand,
                     Mask8 wanted) {
    const CudaBackend::Guard guard(x);
    return layer_norm_mlae_linear_backward(
        grad_out, grad_normalised, x, norm_weight, norm_bias, eps, mean, rstd, weight, lora_a, lora_b, coeff,
        mask, code, operand, wanted, [](const NormLoraCall& call, const NormLoraSaved& saved, Mask8 wanted) {
          const auto shape = norm_lora_shape(call, call.x.numel() / call.x.size(-1));
          const auto plan = kernels::plan_norm_lora(shape, device_limits());
          // Gradients of frozen weights: whoever wants them has other costs.
          const bool base = wanted[1] || wanted[2] || wanted[3];
          if (!plan.fused || shape.linear.num_tokens == 0 || base)
            return compose_norm_lora_backward(call, saved, wanted);
          return backward_fused(call, shape, plan, saved, wanted);
        });
  }
};

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, CUDA, m) {
  m.impl("layer_norm_mlae_linear", alore::ops::NormLoraCuda::forward);
  m.impl("layer_norm_mlae_linear_backward", alore::ops::NormLoraCuda::backward);
}
