// Backward of the fused ALoRE adapter: the kernel that the plan names, and a second launch that adds up what
// its blocks left.
#include "kernels/alore_fused.cuh"
#include "kernels/cuda_common.cuh"

namespace alore::kernels {
namespace {

// Adds the blocks' partial sums in order: 32 entries a block, 16 threads an entry.
constexpr int kReduceLanes = 16;

struct ReduceParams {
  const float* partial;  // [blocks, scale | down | up]
  int blocks, scale_size, down_size;
  int rank, block_dim;
  bool by_column;  // down is [num_experts, rank, block_dim]
};

template <typename Factor>
__global__ void __launch_bounds__(32 * kReduceLanes)
    alore_reduce_kernel(ReduceParams p, Factor* scale, Factor* down, Factor* up) {
  __shared__ float sums[kReduceLanes][32];
  const int x = threadIdx.x % 32, y = threadIdx.x / 32, i = blockIdx.x * 32 + x;
  const int entries = p.scale_size + 2 * p.down_size;
  wait_for_launches_before();
  float sum = 0.0f;
  if (i < entries) {
#pragma unroll 9
    for (int b = y; b < p.blocks; b += kReduceLanes) sum += p.partial[static_cast<int64_t>(b) * entries + i];
  }
  sums[y][x] = sum;
  __syncthreads();
  if (y != 0 || i >= entries) return;
#pragma unroll
  for (int lane = 1; lane < kReduceLanes; ++lane) sum += sums[lane][x];
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
  const auto entries = static_cast<unsigned>(s.scale_size() + 2 * s.down_size());
  // Launched while the first kernel's last blocks work: this one's blocks wait in wait_for_launches_before.
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3((entries + 31) / 32);
  config.blockDim = dim3(32 * kReduceLanes);
  config.stream = context.stream;
  config.attrs = &attribute;
  config.numAttrs = plan.overlaps_launches ? 1 : 0;
  check(cudaLaunchKernelEx(&config, alore_reduce_kernel<Factor>, params, static_cast<Factor*>(a.grad_scale),
                           static_cast<Factor*>(a.grad_down), static_cast<Factor*>(a.grad_up)),
        "alore_reduce");
}

}  // namespace

void alore_backward(const CudaContext& context, const AloreShape& s, const AloreBackwardPlan& plan,
                    const AloreBackwardArgs& a) {
  if (!plan.fused) throw std::runtime_error("alore_backward: no fused kernel for this shape");
  (plan.pipelined ? alore_backward_pipelined : alore_backward_tiles)(context, s, plan, a);
  dispatch(s.factor, [&](auto tag) { launch_reduce<typename decltype(tag)::type>(context, s, plan, a); });
}

}  // namespace alore::kernels
