// Backward of the fused ALoRE adapter: the kernel that the plan names, and a second launch that adds up what
// its blocks left.
#include "kernels/alore_fused.cuh"
#include "kernels/partial_sums.cuh"

namespace alore::kernels {
namespace {

struct ReduceParams {
  const float* partial;  // [blocks, scale | down | up]
  int blocks, scale_size, down_size;
  int rank, block_dim;
  bool by_column;  // down is [num_experts, rank, block_dim]
};

template <typename Factor>
__global__ void __launch_bounds__(kSumThreads)
    alore_reduce_kernel(ReduceParams p, Factor* scale, Factor* down, Factor* up) {
  wait_for_launches_before();
  const int entries = p.scale_size + 2 * p.down_size;
  const float sum = sum_partials(p.partial, p.blocks, entries);
  const int i = blockIdx.x * kSumEntries + threadIdx.x;
  if (threadIdx.x >= kSumEntries || i >= entries) return;
  if (i < p.scale_size) {
    scale[i] = convert<Factor>(sum);
  } else if (i >= p.scale_size + p.down_size) {
    up[i - p.scale_size - p.down_size] = convert<Factor>(sum);
  } else {
    int to = i - p.scale_size;
    if (p.by_column) {
      const int w = to / p.block_dim, j = to % p.block_dim, e = w / p.rank;
      to = (e * p.block_dim + j) * p.rank + w % p.rank;
    }
    down[to] = convert<Factor>(sum);
  }
}

template <typename Factor>
void launch_reduce(const CudaContext& context, const AloreShape& s, const AloreBackwardPlan& plan,
                   const AloreBackwardArgs& a) {
  const ReduceParams params{static_cast<const float*>(a.workspace),
                            plan.blocks,
                            static_cast<int>(s.scale_size()),
                            static_cast<int>(s.down_size()),
                            static_cast<int>(s.rank),
                            static_cast<int>(s.block_dim),
                            plan.pipelined};
  launch_overlapping(alore_reduce_kernel<Factor>, context, sum_blocks(s.scale_size() + 2 * s.down_size()),
                     kSumThreads, 0, plan.overlaps_launches, "alore_reduce", params,
                     static_cast<Factor*>(a.grad_scale), static_cast<Factor*>(a.grad_down),
                     static_cast<Factor*>(a.grad_up));
}

}  // namespace

void alore_backward(const CudaContext& context, const AloreShape& s, const AloreBackwardPlan& plan,
                    const AloreBackwardArgs& a) {
  if (!plan.fused) throw std::runtime_error("alore_backward: no fused kernel for this shape");
  (plan.pipelined ? alore_backward_pipelined : alore_backward_tiles)(context, s, plan, a);
  dispatch(s.factor, [&](auto tag) { launch_reduce<typename decltype(tag)::type>(context, s, plan, a); });
}

}  // namespace alore::kernels
