// Adding up what the blocks of a launch left, in the launch behind it.
#pragma once

#include "kernels/cuda_common.cuh"

namespace alore::kernels {

// A block of such a launch: 32 entries, 16 threads an entry.
inline constexpr int kSumEntries = 32, kSumLanes = 16;

// Entry kSumEntries * blockIdx.x + threadIdx.x % kSumEntries, [blocks, entries] summed over blocks in a fixed
// order; valid in the first kSumEntries threads. To be called by all threads of a block, behind
// wait_for_launches_before.
__device__ __forceinline__ float sum_partials(const float* partial, int blocks, int entries) {
  __shared__ float sums[kSumLanes][kSumEntries];
  const int x = threadIdx.x % kSumEntries, y = threadIdx.x / kSumEntries;
  const int i = blockIdx.x * kSumEntries + x;
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

// Blocks of a launch that sums `entries`, and their threads.
inline int sum_blocks(int64_t entries) { return static_cast<int>((entries + kSumEntries - 1) / kSumEntries); }
inline constexpr int kSumThreads = kSumEntries * kSumLanes;

}  // namespace alore::kernels
