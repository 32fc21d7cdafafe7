// The low-rank linears on CPU: ATen's matrix products, in the activations' dtype forward and in the
// accumulate type for the factors' gradients.
#include "ops/backend_cpu.h"
#include "ops/lora.h"

namespace alore::ops {
namespace {

// t * c with exact zeros in masked columns, even where t is not finite.
Tensor scale_columns(const Tensor& t, const Tensor& c) { return (t * c).masked_fill_(c == 0, 0); }

// c [R] in the accumulate type; draws the mask where that is asked for.
Tensor effective(const LoraCall& call, const LoraMask& mask) {
  const auto acc = accumulate_type(call.x.scalar_type());
  Tensor c = call.coeff.to(acc);
  if (mask.drawn.defined()) {
    if (mask.draw) {
      mask.drawn.bernoulli_(1.0 - mask.p).div_(1.0 - mask.p);
    } else {
      mask.drawn.fill_(1.0);
    }
    c = c * mask.drawn;
  } else if (mask.given.has_value()) {
    c = c * *mask.given;
  }
  return call.expert_rank() == 1 ? c : c.repeat_interleave(call.expert_rank());
}

struct LoraCpu {
  using Guard = CpuBackend::Guard;

  // out = x W^T + bias + ((x A^T) * c) B^T.
  static Tensor forward(const LoraCall& call, const LoraMask& mask, const Tensor& code,
                        const Tensor& operand) {
    const auto dtype = call.x.scalar_type(), acc = accumulate_type(dtype);
    const Tensor c = effective(call, mask);
    if (call.folds) {
      const Tensor live_a = call.lora_a.to(acc).masked_fill((c == 0).unsqueeze(1), 0);
      const Tensor scaled_b = scale_columns(call.lora_b.to(acc), c);
      operand.copy_(at::addmm(call.weight, scaled_b, live_a));
      return at::linear(call.x, operand, call.bias);
    }
    // What CUDA's backward reads again. Here the term is added in one pass over chunks that stay in the
    // cache, which computes the code anew in backward as well.
    operand.zero_();
    code.zero_();
    const Tensor out = at::linear(call.x, call.weight, call.bias);
    if (call.x.size(0) > 0) CpuBackend::lora_forward(call.x, {call.lora_a, call.lora_b, c}, out);
    return out;
  }

  static LoraGrads backward(const LoraCall& call, const LoraMask& mask, const Tensor& grad, const Tensor&,
                            const Tensor& operand, Tensor& grad_x) {
    const Tensor c = effective(call, mask);
    const Tensor side_grad_x = call.folds ? Tensor() : grad_x;
    if (grad_x.defined()) at::mm_out(grad_x, grad, call.folds ? operand : call.weight);
    LoraGrads grads = CpuBackend::lora_backward(call.x, grad, {call.lora_a, call.lora_b, c}, side_grad_x);
    Tensor per_row = grads.coeff.to(c.scalar_type());
    if (call.expert_rank() > 1) per_row = per_row.view({-1, call.expert_rank()}).sum(1);
    if (mask.given.has_value()) per_row = scale_columns(per_row, *mask.given);
    return {grads.a, grads.b, per_row.to(call.lora_a.scalar_type())};
  }
};

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, CPU, m) { alore::ops::register_lora<alore::ops::LoraCpu>(m); }
