// The grouped ops on CPU: the samples of each adapter together, through the single op's own kernels.
#include <map>
#include <vector>

#include "ops/backend_cpu.h"
#include "ops/grouped.h"
#include "ops/ops.h"

namespace alore::ops {
namespace {

// Positions of the samples that take an adapter, by adapter; -1 for none.
std::map<int64_t, Tensor> samples_by_adapter(const char* op, const Tensor& index, int64_t num_adapters) {
  std::map<int64_t, std::vector<int64_t>> positions;
  const int64_t* values = index.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < index.size(0); ++b) {
    TORCH_CHECK(values[b] >= -1 && values[b] < num_adapters, op, ": index must be in [-1, ", num_adapters,
                "), got ", values[b], " for sample ", b);
    positions[values[b]].push_back(b);
  }
  std::map<int64_t, Tensor> tensors;
  for (const auto& [adapter, samples] : positions)
    tensors.emplace(adapter, at::tensor(samples, index.options()));
  return tensors;
}

// The samples of one adapter, [num_tokens, features].
Tensor rows_of(const Tensor& x, const Tensor& samples) { return x.index_select(0, samples).flatten(0, 1); }

void put_rows(Tensor& out, const Tensor& samples, const Tensor& rows) {
  out.index_copy_(0, samples, rows.view({samples.size(0), out.size(1), out.size(2)}));
}

struct GroupedCpu {
  using Guard = CpuBackend::Guard;

  static Tensor kron(const KronGrouped& call) {
    Tensor out = at::empty(call.x.sizes(), call.x.options().dtype(call.out_dtype));
    for (const auto& [adapter, samples] : samples_by_adapter(call.op, call.index, call.num_adapters())) {
      const Tensor rows = rows_of(call.x, samples);
      const auto statistics = rows.options().dtype(accumulate_type(rows.scalar_type()));
      const Tensor mean = call.norm ? at::empty({rows.size(0)}, statistics) : Tensor();
      const Tensor rstd = call.norm ? at::empty({rows.size(0)}, statistics) : Tensor();
      put_rows(out, samples,
               adapter < 0 ? plain(call, rows, mean, rstd) : adapted(call, adapter, rows, mean, rstd));
    }
    return out;
  }

  static Tensor lora(const LoraGrouped& call) {
    const int64_t num_adapters = static_cast<int64_t>(call.lora_a.size());
    const auto groups = samples_by_adapter(call.op, call.index, num_adapters);
    Tensor out = at::linear(call.x, call.weight.to(call.x.scalar_type()), call.bias).contiguous();
    for (const auto& [adapter, samples] : groups) {
      if (adapter < 0 || call.x.size(1) == 0) continue;
      const Tensor update = rows_of(out, samples);
      CpuBackend::lora_forward(rows_of(call.x, samples),
                               {call.lora_a[adapter], call.lora_b[adapter], call.coeff[adapter]}, update);
      put_rows(out, samples, update);
    }
    return out;
  }

 private:
  static Tensor plain(const KronGrouped& call, const Tensor& rows, const Tensor& mean, const Tensor& rstd) {
    if (call.norm) {
      return CpuBackend::layer_norm_forward(rows, call.weight, call.bias, call.eps, call.out_dtype, mean,
                                            rstd);
    }
    return call.add_base ? rows : at::zeros_like(rows);
  }

  static Tensor adapted(const KronGrouped& call, int64_t adapter, const Tensor& rows, const Tensor& mean,
                        const Tensor& rstd) {
    const Tensor &scale = call.scale[adapter], &down = call.down[adapter], &up = call.up[adapter];
    return run_forward<CpuBackend>({.x = rows,
                                    .norm = call.norm,
                                    .weight = call.weight,
                                    .bias = call.bias,
                                    .eps = call.eps,
                                    .factors = {scale, down, up},
                                    .add_base = call.add_base,
                                    .out_dtype = call.out_dtype},
                                   {}, mean, rstd);
  }
};

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, CPU, m) { alore::ops::register_grouped<alore::ops::GroupedCpu>(m); }
