// What the norm and low-rank kernels share: A behind the norm, folded into products as in
// alore_pipelined.cuh,
//   code = n A^T = rstd * (x D^T - mean sum(D)) + A bias,    D = weight * A.
#pragma once

#include "kernels/alore_pipelined.cuh"
#include "kernels/norm_lora.h"
#include "kernels/norm_lora_layout.h"

namespace alore::kernels {

struct CodeFactor {
  const void* a;  // [rank, dim]
  DType type;
  int rank;
};

// Makes the images at `shared`; all values are on their way before the first is used. Rows w of A where
// live(w) is false count as zeros. Every weight is also given to put_weight(column, value). `scratch` is
// CodeImages::scratch_bytes of memory, free again when this returns.
template <typename T, int kDim, int kThreads, typename Live, typename PutWeight>
__device__ __forceinline__ void make_code_images(unsigned char* shared, float* scratch, const CodeFactor& f,
                                                 const AffineSource& affine, Live live,
                                                 PutWeight put_weight) {
  constexpr CodeImages kI(kDim);
  constexpr int kEntries = kCodeColumns * kDim, kCount = ceil_div(kEntries, kThreads), kParts = kDim / 32;
  static_assert(kDim % 32 == 0 && kParts <= 32 && kThreads >= kCodeColumns * 32);
  auto *weight = reinterpret_cast<float*>(shared + kI.weight),
       *bias = reinterpret_cast<float*>(shared + kI.bias);
  uint32_t bits[kCount];
  AffineBatch<kDim, kThreads> weights, biases;
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    const int i = threadIdx.x + u * kThreads;
    bits[u] = i < f.rank * kDim ? factor_bits(f.a, f.type == DType::kFloat32, i) : 0;
  }
  weights.load(affine.weight, affine.type);
  biases.load(affine.bias, affine.type);
  weights.put(affine.weight, affine.type, 1.0f, [&](int i, float v) {
    weight[i] = v;
    put_weight(i, v);
  });
  biases.put(affine.bias, affine.type, 0.0f, [&](int i, float v) { bias[i] = v; });
  __syncthreads();
#pragma unroll
  for (int u = 0; u < kCount; ++u) {
    const int i = threadIdx.x + u * kThreads, w = i / kDim, column = i % kDim;
    if (i >= kEntries) break;  // whole warps
    const float v = live(w) ? factor_value(bits[u], f.type) : 0.0f;
    const T d = convert<T>(weight[column] * v);
    reinterpret_cast<T*>(shared + kI.factor)[w * kI.factor_stride + column] = d;
    const float sum = warp_sum(convert<float>(d)), of_bias = warp_sum(bias[column] * v);
    if (threadIdx.x % 32 == 0) {
      scratch[i / 32] = sum;
      scratch[kEntries / 32 + i / 32] = of_bias;
    }
  }
  __syncthreads();
  if (threadIdx.x < kCodeColumns * 32) {
    const int w = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float* parts = scratch + w * kParts + lane;
    const float sum = warp_sum(lane < kParts ? parts[0] : 0.0f);
    const float of_bias = warp_sum(lane < kParts ? parts[kEntries / 32] : 0.0f);
    if (lane == 0) {
      reinterpret_cast<float*>(shared + kI.column_sum)[w] = sum;
      reinterpret_cast<float*>(shared + kI.column_bias)[w] = of_bias;
    }
  }
  __syncthreads();
}

// A lane's part of ldmatrix addresses of [8, 32] pieces of the factor: as the B operand that sums over the
// columns, or, read transposed, over the code.
__device__ __forceinline__ uint32_t factor_lane(int lane, int stride_bytes) {
  return lane % 8 * stride_bytes + lane / 8 * 16;
}

}  // namespace alore::kernels
