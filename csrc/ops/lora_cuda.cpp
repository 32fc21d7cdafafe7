// The low-rank linears on CUDA: allocates, launches kernels/lora.h and the base products around them.
#include <ATen/cuda/CUDAContext.h>

#include "ops/backend_cuda.h"
#include "ops/cuda_call.h"
#include "ops/lora.h"
#include "ops/lora_operands.h"

namespace alore::ops {
namespace {

using kernels::CudaContext;
using kernels::LoraPath;
using kernels::Op;

kernels::LoraPlan plan(const LoraCall& call, const kernels::LoraShape& shape) {
  const cudaDeviceProp* device = at::cuda::getCurrentDeviceProperties();
  return kernels::plan_lora(shape, kernel_dtype(call.weight.scalar_type()),
                            {device->multiProcessorCount, device->sharedMemPerBlockOptin});
}

struct Operands : LoraOperands {
  CudaContext context = current_context();
  kernels::LoraPlan plan;

  Operands(const LoraCall& call, const LoraMask& source)
      : LoraOperands(call, source), plan(ops::plan(call, shape)) {}
};

// The general side path's operands: padded factors and c, by one kernel.
struct PackedRows {
  Tensor a, b, effective;

  PackedRows(const LoraCall& call, const Operands& o, bool clear_a, bool clear_b) {
    const int64_t width = kernels::lora_code_width(o.shape.activation, o.shape.rank);
    a = at::empty({width, o.shape.in_features}, call.x.options());
    b = at::empty({o.shape.out_features, width}, call.x.options());
    effective = at::empty({width}, call.x.options().dtype(accumulate_type(call.x.scalar_type())));
    kernels::lora_pack_rows(o.context, o.shape, o.factors(), o.coefficients, clear_a, clear_b, write(a),
                            write(b), write(effective));
  }

  // code = x a^T
  void encode(const Operands& o, const Tensor& x, const Tensor& code) const {
    kernels::gemm(o.context, Op::kNone, Op::kTranspose, x.size(0), a.size(0), x.size(1), o.shape.activation,
                  read(x), x.size(1), read(a), x.size(1), 0.0f, o.shape.activation, write(code), a.size(0));
  }

  Tensor scaled(const Operands& o, const Tensor& code) const {
    Tensor out = at::empty(code.sizes(), a.options());
    kernels::lora_scale(o.context, o.shape, kernel_dtype(code.scalar_type()), read(code), read(effective),
                        write(out));
    return out;
  }
};

Tensor forward_folded(const LoraCall& call, const Operands& o, const Tensor& operand) {
  const Tensor weight = call.weight.contiguous();
  kernels::lora_fold(o.context, o.shape, o.factors(), o.coefficients, read(weight), write(operand));
  return at::linear(call.x, operand, call.bias);
}

// The rank term inside the base product: [x | t] [W | Bc]^T + bias, which writes y once and rounds it once.
Tensor forward_extended(const LoraCall& call, const LoraMask& mask, const Operands& o, const Tensor& code,
                        const Tensor& operand) {
  const int64_t width = o.shape.in_features + o.plan.code_width;
  const Tensor x = dense_aligned(call.x), weight = dense_aligned(call.weight);
  const Tensor extended_weight = at::empty({o.shape.out_features, width}, weight.options());
  const Tensor extended_x = at::empty({o.shape.num_tokens, width}, x.options());
  kernels::lora_pack(o.context, o.shape, o.factors(), o.coefficients, write(operand), read(weight),
                     write(extended_weight));
  kernels::lora_fused_forward(o.context, o.shape, o.drawn(mask), read(operand), read(x), nullptr, write(code),
                              nullptr, write(extended_x));
  return at::linear(extended_x, extended_weight, call.bias);
}

Tensor forward_fused(const LoraCall& call, const LoraMask& mask, const Operands& o, const Tensor& code,
                     const Tensor& operand) {
  kernels::lora_pack(o.context, o.shape, o.factors(), o.coefficients, write(operand), nullptr, nullptr);
  const Tensor x = dense_aligned(call.x), bias = call.bias.has_value() ? dense_aligned(*call.bias) : Tensor();
  Tensor out = at::empty({o.shape.num_tokens, o.shape.out_features}, x.options());
  kernels::lora_fused_forward(o.context, o.shape, o.drawn(mask), read(operand), read(x), read(bias),
                              write(code), write(out), nullptr);
  add_base_product(o.context, x, call.weight, true, out);
  return out;
}

Tensor forward_gemm(const LoraCall& call, const Operands& o, const Tensor& code, const Tensor& operand) {
  operand.zero_();  // the fused kernels' packed factors, which nothing here reads
  const PackedRows packed(call, o, false, true);
  if (o.shape.num_tokens == 0) return at::empty({0, o.shape.out_features}, call.x.options());
  packed.encode(o, call.x, code);
  const Tensor scaled = packed.scaled(o, code);
  const Tensor out =
      call.bias.has_value() ? at::addmm(*call.bias, scaled, packed.b.t()) : at::mm(scaled, packed.b.t());
  add_base_product(o.context, call.x, call.weight, true, out);
  return out;
}

// Undefined grad_x is left alone. Otherwise, where W is folded dx is one product; else the low-rank part is
// written first and the base product added onto it.
LoraGrads backward_fused(const LoraCall& call, const Operands& o, const Tensor& grad, const Tensor& code,
                         const Tensor& operand, Tensor& grad_x) {
  const Tensor x = dense_aligned(call.x), grad_out = dense_aligned(grad);
  Tensor kept = code, packed = operand;
  const Tensor side_grad_x = call.folds ? Tensor() : grad_x;
  if (call.folds) {
    packed = at::empty({kernels::lora_operand_elements(o.shape)}, x.options());
    kept = at::empty({x.size(0), kernels::lora_code_width(o.shape.activation, o.shape.rank)}, x.options());
    kernels::lora_pack(o.context, o.shape, o.factors(), o.coefficients, write(packed), nullptr, nullptr);
    kernels::lora_fused_forward(o.context, o.shape, o.coefficients, read(packed), read(x), nullptr,
                                write(kept), nullptr, nullptr);
  } else {
    kept = dense_aligned(code);
    packed = dense_aligned(operand);
  }
  LoraGrads grads{at::empty(o.a.sizes(), o.a.options()), at::empty(o.b.sizes(), o.b.options()),
                  at::empty(o.coeff.sizes(), o.coeff.options())};
  const Tensor workspace =
      at::empty({static_cast<int64_t>(o.plan.workspace_bytes)}, x.options().dtype(at::kByte));
  kernels::lora_fused_backward(o.context, o.shape, o.plan, o.factors(), o.coefficients, read(packed), read(x),
                               read(grad_out), read(kept), write(side_grad_x),
                               {write(grads.a), write(grads.b), write(grads.coeff)}, write(workspace));
  if (grad_x.defined() && call.folds) {
    at::mm_out(grad_x, grad_out, operand);
  } else if (grad_x.defined()) {
    add_base_product(o.context, grad_out, call.weight, false, grad_x);
  }
  return grads;
}

LoraGrads backward_gemm(const LoraCall& call, const LoraMask& mask, const Operands& o, const Tensor& grad,
                        const Tensor& code, const Tensor& operand, Tensor& grad_x) {
  const auto& s = o.shape;
  const auto acc = kernels::accumulate_type(s.activation);
  const PackedRows packed(call, o, !call.folds, false);
  const int64_t width = packed.a.size(0);
  const auto sums = packed.effective.options();
  Tensor kept = code;
  if (call.folds) {
    kept = at::empty({s.num_tokens, width}, call.x.options());
    packed.encode(o, call.x, kept);
  }
  const Tensor grad_code = at::empty({s.num_tokens, width}, sums);
  kernels::gemm(o.context, Op::kNone, Op::kNone, s.num_tokens, width, s.out_features, s.activation,
                read(grad), s.out_features, read(packed.b), width, 0.0f, acc, write(grad_code), width);
  const Tensor scaled = packed.scaled(o, kept), scaled_grad = packed.scaled(o, grad_code);
  if (grad_x.defined() && call.folds) {
    at::mm_out(grad_x, grad, operand);
  } else if (grad_x.defined()) {
    at::mm_out(grad_x, scaled_grad, packed.a);
    add_base_product(o.context, grad, call.weight, false, grad_x);
  }
  // Gradients of A and B leave the products in the accumulate type, whatever the activations are.
  const Tensor sum_a = at::empty({width, s.in_features}, sums),
               sum_b = at::empty({s.out_features, width}, sums);
  kernels::gemm(o.context, Op::kTranspose, Op::kNone, width, s.in_features, s.num_tokens, s.activation,
                read(scaled_grad), width, read(call.x), s.in_features, 0.0f, acc, write(sum_a),
                s.in_features);
  kernels::gemm(o.context, Op::kTranspose, Op::kNone, s.out_features, width, s.num_tokens, s.activation,
                read(grad), s.out_features, read(scaled), width, 0.0f, acc, write(sum_b), width);
  LoraGrads grads{at::empty(o.a.sizes(), o.a.options()), at::empty(o.b.sizes(), o.b.options()),
                  at::empty(o.coeff.sizes(), o.coeff.options())};
  const int64_t blocks = kernels::plan_reduce_blocks(s.num_tokens, width);
  const Tensor partial = at::empty({blocks, width}, sums);
  kernels::lora_coeff_grad(o.context, s, read(kept), read(grad_code),
                           mask.given ? read(*mask.given) : nullptr, blocks, write(partial),
                           write(grads.coeff));
  kernels::lora_unpack_gradients(o.context, s, read(sum_a), read(sum_b), read(packed.effective),
                                 write(grads.a), write(grads.b));
  return grads;
}

struct LoraCuda {
  using Guard = CudaBackend::Guard;

  static Tensor forward(const LoraCall& call, const LoraMask& mask, const Tensor& code,
                        const Tensor& operand) {
    const Operands o(call, mask);
    if (o.plan.forward == LoraPath::kFold) return forward_folded(call, o, operand);
    if (o.plan.forward == LoraPath::kExtended) return forward_extended(call, mask, o, code, operand);
    if (o.plan.forward == LoraPath::kFused) return forward_fused(call, mask, o, code, operand);
    return forward_gemm(call, o, code, operand);
  }

  static LoraGrads backward(const LoraCall& call, const LoraMask& mask, const Tensor& grad,
                            const Tensor& code, const Tensor& operand, Tensor& grad_x) {
    const Operands o(call, mask);
    if (o.plan.backward == LoraPath::kGemm) return backward_gemm(call, mask, o, grad, code, operand, grad_x);
    return backward_fused(call, o, grad, code, operand, grad_x);
  }
};

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, CUDA, m) { alore::ops::register_lora<alore::ops::LoraCuda>(m); }
