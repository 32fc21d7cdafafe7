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
    operand.zero_();  // CUDA's packed factors: nothing here reads them
    Tensor kept = code.narrow(1, 0, call.rank());
    if (code.size(1) == call.rank()) {
      at::mm_out(kept, call.x, call.lora_a.to(dtype).t());
    } else {
      code.zero_();
      kept.copy_(at::mm(call.x, call.lora_a.to(dtype).t()));
    }
    const Tensor scaled = scale_columns(kept.to(acc), c).to(dtype);
    const Tensor b = call.lora_b.to(dtype).masked_fill(c == 0, 0);  // 0 * inf would reach y
    Tensor out = call.bias.has_value() ? at::addmm(*call.bias, scaled, b.t()) : at::mm(scaled, b.t());
    return out.addmm_(call.x, call.weight.t());
  }

  static LoraGrads backward(const LoraCall& call, const LoraMask& mask, const Tensor& grad,
                            const Tensor& code, const Tensor& operand, Tensor& grad_x) {
    const auto dtype = call.x.scalar_type(), acc = accumulate_type(dtype), factor = call.lora_a.scalar_type();
    const Tensor c = effective(call, mask), a = call.lora_a.to(acc), b = call.lora_b.to(acc);
    const Tensor wide_x = call.x.to(acc), wide_grad = grad.to(acc);
    const Tensor kept = call.folds ? at::mm(wide_x, a.t()) : code.narrow(1, 0, call.rank()).to(acc);
    const Tensor grad_code = at::mm(wide_grad, b), scaled_grad = scale_columns(grad_code, c);
    if (grad_x.defined() && call.folds) {
      at::mm_out(grad_x, grad, operand);
    } else if (grad_x.defined()) {
      const Tensor live_a = call.lora_a.to(dtype).masked_fill((c == 0).unsqueeze(1), 0);
      at::mm_out(grad_x, scaled_grad.to(dtype), live_a);
      grad_x.addmm_(grad, call.weight);
    }
    // Masked rows are cleared after the products too: 0 * inf in an activation would leave NaN there.
    const Tensor masked = c == 0;
    Tensor per_row = (kept * grad_code).sum(0);
    if (call.expert_rank() > 1) per_row = per_row.view({-1, call.expert_rank()}).sum(1);
    if (mask.given.has_value()) per_row = scale_columns(per_row, *mask.given);
    return {at::mm(scaled_grad.t(), wide_x).masked_fill_(masked.unsqueeze(1), 0).to(factor),
            at::mm(wide_grad.t(), scale_columns(kept, c)).masked_fill_(masked, 0).to(factor),
            per_row.to(factor)};
  }
};

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, CPU, m) { alore::ops::register_lora<alore::ops::LoraCpu>(m); }
