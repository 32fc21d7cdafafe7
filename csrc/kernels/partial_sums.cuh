// Adding up what the blocks of a launch left, in the launch behind it.
#pragma once

#include "kernels/cuda_common.cuh"

namespace alore::kernels {

// A block of such a launch: 32 entries, 16 threads an entry.
inline constexpr int kSumEntries = 32, kSumLanes = 16;

// Entry kSumEntries * blockIdx.x + threadIdx.x % kSumEntries, [blocks, entries] summed over blocks in a fixed
// order; valid in the first kSumEntries threads. To be called by all threads of a block.
__device__ __forceinline__ float sum_partials(const float* partial, int blocks, int entries) {
  __shared__ float sums[kSumLanes][kSumEntries];
  const int x = threadIdx.x % kSumEntries, y = threadIdx.x / kSumEntries;
  const int i = blockIdx.x * kSumEntries + x;
  wait_for_launches_before();
  float sum = 0.0f;
  if (i < entries) {
#pragma unroll 9
    for (int b = y; b < blocks; b += kSumLanes) sum += partial[static_cast<int64_t>(b) * entries + i];
  }
  sums[y][x] = sum;
  __syncthreads();
#pragma unroll
  for (int lane = 1; lane < kSumLanes; ++lane) {
    if (y == 0) sum += sums[lane][x];
  }
  return sum;
}

// Launches kernel(args...) over `entries`. Where `overlaps`, while the last launch's blocks end: this one's
// wait in sum_partials.
template <typename... Params, typename... Args>
void launch_sums(void (*kernel)(Params...), const CudaContext& context, int entries, bool overlaps,
                 const char* what, Args... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>((entries + kSumEntries - 1) / kSumEntries));
  config.blockDim = dim3(kSumEntries * kSumLanes);
  config.stream = context.stream;
  config.attrs = &attribute;
  config.numAttrs = overlaps ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args...), what);
}

}  // namespace alore::kernels
