// The grouped ops on CUDA: fused where every adapter has a shape that the fused kernels take, else the
// composition.
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "kernels/alore_grouped.h"
#include "kernels/lora_grouped.h"
#include "ops/backend_cuda.h"
#include "ops/cuda_call.h"
#include "ops/grouped.h"
#include "ops/lora.h"

namespace alore::ops {
namespace {

// Said once a reason: 16-bit activations are what the fused kernels are for. `planner` says which shapes are
// fused.
template <typename Call, typename Plan>
void note_composition(const Call& call, at::ScalarType out, const Plan& plan, const char* planner) {
  if (out != at::kHalf && out != at::kBFloat16) return;
  static std::mutex mutex;
  static std::set<std::string> said;
  const std::lock_guard lock(mutex);
  if (said.insert(plan.reason).second) {
    TORCH_WARN("alore_ext: ", call.op, " of ", call.x.size(2),
               " features takes the general CUDA path, which is slower, because of adapter ", plan.refused,
               ": ", plan.reason, ". alore_ext.ops.", planner, " says which shapes are fused.");
  }
}

at::ScalarType affine_type(const KronGrouped& call) {
  if (call.weight.has_value() && call.weight->defined()) return call.weight->scalar_type();
  return call.bias.has_value() && call.bias->defined() ? call.bias->scalar_type() : at::kFloat;
}

struct GroupedCuda {
  using Guard = CudaBackend::Guard;

  static Tensor kron(const KronGrouped& call) {
    const int64_t samples = call.x.size(0), num_tokens = samples * call.x.size(1);
    std::vector<kernels::AloreShape> shapes;
    for (size_t i = 0; i < call.scale.size(); ++i) {
      shapes.push_back(alore_shape(num_tokens, call.x.scalar_type(), call.out_dtype, call.scale[i],
                                   call.down[i], call.norm, affine_type(call), call.add_base));
    }
    const auto plan = kernels::plan_alore_grouped(samples, shapes, device_limits());
    if (!plan.fused) {
      note_composition(call, call.out_dtype, plan, "plan_alore");
      return compose_kron_grouped(call);
    }
    const Tensor out = at::empty(call.x.sizes(), call.x.options().dtype(call.out_dtype));
    if (num_tokens == 0) return out;
    // What the adapters' pointers point into, where a factor is not contiguous.
    std::vector<Tensor> kept;
    const auto pointer = [&](const Tensor& t) { return read(kept.emplace_back(t.contiguous())); };
    std::vector<kernels::AloreAdapter> adapters;
    for (size_t i = 0; i < call.scale.size(); ++i) {
      adapters.push_back({pointer(call.scale[i]), pointer(call.down[i]), pointer(call.up[i])});
    }
    const Tensor x = aligned(call.x);
    const OptTensor weight = contiguous(call.weight), bias = contiguous(call.bias);
    kernels::alore_grouped_forward(current_context(), samples, shapes, plan,
                                   {.x = read(x),
                                    .norm = {read(weight), read(bias), static_cast<float>(call.eps)},
                                    .adapters = adapters,
                                    .index = call.index.const_data_ptr<int64_t>(),
                                    .out = write(out)});
    return out;
  }

  static Tensor lora(const LoraGrouped& call) {
    const int64_t samples = call.x.size(0);
    const Tensor x = aligned(call.x).view({samples * call.x.size(1), call.x.size(2)});
    std::vector<kernels::LoraShape> shapes;
    for (const Tensor& a : call.lora_a) shapes.push_back(lora_shape(x, call.weight, a, 1));
    const auto plan = kernels::plan_lora_grouped(samples, shapes);
    if (!plan.fused) {
      note_composition(call, x.scalar_type(), plan, "plan_lora_grouped");
      return compose_lora_grouped(call);
    }
    const Tensor out = at::empty({x.size(0), call.weight.size(0)}, x.options());
    if (x.size(0) == 0) return out;
    std::vector<Tensor> kept;  // what the adapters' pointers point into, where a factor is not contiguous
    const auto pointer = [&](const Tensor& t) { return read(kept.emplace_back(t.contiguous())); };
    std::vector<kernels::LoraAdapter> adapters;
    for (size_t i = 0; i < call.lora_a.size(); ++i) {
      adapters.push_back({pointer(call.lora_a[i]), pointer(call.lora_b[i]), pointer(call.coeff[i])});
    }
    const Tensor bias = call.bias.has_value() ? aligned(call.bias->contiguous()) : Tensor();
    const Tensor workspace = bytes(plan.workspace_bytes, x);
    const kernels::CudaContext context = current_context();
    kernels::lora_grouped_forward(context, samples, shapes, plan,
                                  {.x = read(x),
                                   .bias = read(bias),
                                   .adapters = adapters,
                                   .index = call.index.const_data_ptr<int64_t>(),
                                   .workspace = write(workspace),
                                   .y = write(out)});
    add_base_product(context, x, call.weight.to(x.scalar_type()), true, out);
    return out;
  }
};

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, CUDA, m) { alore::ops::register_grouped<alore::ops::GroupedCuda>(m); }
