// The fused ALoRE kernels as CudaBackend's fused_forward and fused_backward.
#include <mutex>
#include <set>
#include <string>

#include "kernels/alore.h"
#include "ops/backend_cuda.h"
#include "ops/cuda_call.h"

namespace alore::ops {
namespace {

// The contiguous tensors that a fused call's pointers point into.
struct FusedCall {
  kernels::AloreShape shape;
  Tensor scale, down, up;
  OptTensor weight, bias;

  explicit FusedCall(const AloreCall& c)
      : shape(alore_shape(c.x.size(0), c.x.scalar_type(), c.out_dtype, c.factors.scale, c.factors.down,
                          c.norm, affine_type(c), c.add_base)),
        scale(c.factors.scale.contiguous()),
        down(c.factors.down.contiguous()),
        up(c.factors.up.contiguous()),
        weight(contiguous(c.weight)),
        bias(contiguous(c.bias)) {
    shape.dropout = c.dropout_p != 0.0;
  }

  static at::ScalarType affine_type(const AloreCall& c) {
    if (c.weight.has_value() && c.weight->defined()) return c.weight->scalar_type();
    return c.bias.has_value() && c.bias->defined() ? c.bias->scalar_type() : at::kFloat;
  }

  kernels::AloreAdapter adapter() const { return {read(scale), read(down), read(up)}; }
  kernels::AloreNormArgs norm(const AloreCall& c) const {
    return {read(weight), read(bias), static_cast<float>(c.eps)};
  }
  static kernels::AloreDropout dropout(const AloreCall& c) {
    if (c.dropout_p == 0.0) return {};
    return {c.seed->const_data_ptr<int64_t>(), c.dropout_p};
  }
};

// Said once a reason: 16-bit activations are what the fused kernels are for.
void note_general_path(const AloreCall& call, const char* reason) {
  if (call.out_dtype != at::kHalf && call.out_dtype != at::kBFloat16) return;
  static std::mutex mutex;
  static std::set<std::string> said;
  const std::lock_guard lock(mutex);
  if (said.insert(reason).second) {
    TORCH_WARN("alore_ext: an adapter of embed_dim ", call.x.size(1), " and num_experts ",
               call.factors.scale.size(0), " takes the general CUDA path, which is slower: ", reason,
               ". alore_ext.ops.plan_alore says which shapes are fused.");
  }
}

}  // namespace

bool CudaBackend::fused_forward(const AloreCall& call, const Tensor& out, const Tensor& sum,
                                const Tensor& mean, const Tensor& rstd) {
  if (!is_square(call.factors.scale, call.factors.down, call.factors.up)) return false;
  FusedCall f(call);
  f.shape.residual = call.residual.defined();
  const auto plan = kernels::plan_alore_forward(f.shape, device_limits());
  if (!plan.fused) {
    note_general_path(call, plan.reason);
    return false;
  }
  if (f.shape.num_tokens == 0) return true;
  const Tensor x = aligned(call.x), residual = aligned(call.residual);
  kernels::alore_forward(stream_context(), f.shape, plan,
                         {.x = read(x),
                          .residual = read(residual),
                          .norm = f.norm(call),
                          .adapter = f.adapter(),
                          .dropout = FusedCall::dropout(call),
                          .out = write(out),
                          .sum = write(sum),
                          .mean = static_cast<float*>(write(mean)),
                          .rstd = static_cast<float*>(write(rstd))});
  return true;
}

bool CudaBackend::fused_backward(const AloreCall& call, const Tensor& grad_out, const Tensor& grad_sum,
                                 const Tensor& mean, const Tensor& rstd, const Tensor& grad_x,
                                 FactorGrads& grads) {
  if (!is_square(call.factors.scale, call.factors.down, call.factors.up)) return false;
  FusedCall f(call);
  f.shape.residual = grad_sum.defined();
  const auto plan = kernels::plan_alore_backward(f.shape, device_limits());
  if (!plan.fused) {
    note_general_path(call, plan.reason);
    return false;
  }
  if (f.shape.num_tokens == 0) {
    grads = zero_grads(call.factors);
    return true;
  }
  const Tensor x = aligned(call.x), grad = aligned(grad_out), more = aligned(grad_sum);
  grads = {at::empty_like(f.scale), at::empty_like(f.down), at::empty_like(f.up)};
  const Tensor workspace = bytes(plan.workspace_bytes, x);
  kernels::alore_backward(stream_context(), f.shape, plan,
                          {.grad_out = read(grad),
                           .grad_sum = read(more),
                           .sum = read(x),
                           .norm = f.norm(call),
                           .mean = static_cast<const float*>(read(mean)),
                           .rstd = static_cast<const float*>(read(rstd)),
                           .adapter = f.adapter(),
                           .dropout = FusedCall::dropout(call),
                           .grad_x = write(grad_x),
                           .grad_scale = write(grads.scale),
                           .grad_down = write(grads.down),
                           .grad_up = write(grads.up),
                           .workspace = write(workspace)});
  return true;
}

}  // namespace alore::ops
