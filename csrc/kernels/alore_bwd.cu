// Backward of the fused ALoRE adapter: the kernel that the plan names, and a second launch that adds up what
// its blocks left.
#include "kernels/alore_fused.cuh"
#include "kernels/cuda_common.cuh"

namespace alore::kernels {
namespace {

// Adds the blocks' partial sums in order: 32 entries a block, 16 threads an entry.
constexpr int kReduceLanes = 16;

template <typename Factor>
__global__ void __launch_bounds__(32 * kReduceLanes)
    alore_reduce_kernel(const float* __restrict__ partial, int blocks, int scale_size, int down_size,
                        int entries, Factor* scale, Factor* down, Factor* up) {
  __shared__ float sums[kReduceLanes][32];
  const int x = threadIdx.x % 32, y = threadIdx.x / 32, i = blockIdx.x * 32 + x;
  float sum = 0.0f;
  if (i < entries) {
#pragma unroll 9
    for (int b = y; b < blocks; b += kReduceLanes) sum += partial[static_cast<int64_t>(b) * entries + i];
  }
  sums[y][x] = sum;
  __syncthreads();
  if (y != 0 || i >= entries) return;
#pragma unroll
  for (int lane = 1; lane < kReduceLanes; ++lane) sum += sums[lane][x];
  Factor* to = i < scale_size               ? scale + i
               : i < scale_size + down_size ? down + i - scale_size
                                            : up + i - scale_size - down_size;
  *to = convert<Factor>(sum);
}

}  // namespace

void alore_backward(const CudaContext& context, const AloreShape& s, const AloreBackwardPlan& plan,
                    const AloreBackwardArgs& a) {
  if (!plan.fused) throw std::runtime_error("alore_backward: no fused kernel for this shape");
  (plan.pipelined ? alore_backward_pipelined : alore_backward_tiles)(context, s, plan, a);
  const int scale_size = static_cast<int>(s.scale_size()), down_size = static_cast<int>(s.down_size());
  const int entries = scale_size + 2 * down_size;
  dispatch(s.factor, [&](auto tag) {
    using Factor = typename decltype(tag)::type;
    alore_reduce_kernel<Factor><<<(entries + 31) / 32, 32 * kReduceLanes, 0, context.stream>>>(
        static_cast<const float*>(a.workspace), plan.blocks, scale_size, down_size, entries,
        static_cast<Factor*>(a.grad_scale), static_cast<Factor*>(a.grad_down),
        static_cast<Factor*>(a.grad_up));
  });
  check_launch("alore_reduce");
}

}  // namespace alore::kernels
