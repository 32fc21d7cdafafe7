// What the gradient of a layer norm needs of a row before it can be written: with g = rstd * weight * grad
// and n = (x - mean) * rstd, sums over the row of g and of g * n, from 16 rows in shared memory whose columns
// are dealt out to warps.
#pragma once

#include "kernels/row_moments.cuh"

namespace alore::kernels {

// Two bf16 products, rounded.
__device__ __forceinline__ uint32_t product2(uint32_t a, uint32_t b) {
  const __nv_bfloat162 v =
      __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&v);
}

// Of a warp's columns: sums of weight * grad, and of x * weight * grad as the diagonal of a product of rows.
// weight * grad is rounded to 16 bits; its roundings average out over a row.
template <typename T>
class WarpGradients {
  float sum_[4] = {}, gram0_[4] = {}, gram1_[4] = {};

 public:
  // Half `half` of 32 columns, grad and x as the A operand; `weights`: a lane's, by_lane.
  __device__ __forceinline__ void add(const uint32_t (&grad)[4], const uint32_t (&x)[4], const uint4& weights,
                                      int half) {
    const uint32_t left = half == 0 ? weights.x : weights.z, right = half == 0 ? weights.y : weights.w;
    const uint32_t weighted[4] = {product2(grad[0], left), product2(grad[1], left), product2(grad[2], right),
                                  product2(grad[3], right)};
    const uint32_t ones = pack2<T>(1.0f, 1.0f);
    mma<T>(sum_, weighted, ones, ones);
    mma<T>(gram0_, weighted, x[0], x[2]);
    mma<T>(gram1_, weighted, x[1], x[3]);
  }

  // {sum, diagonal} of each row, to row_sums[16].
  __device__ __forceinline__ void leave(float2* row_sums, int g, int c) const {
    if (c == g / 2) {  // this lane has the diagonals' entries g
      row_sums[g] = {sum_[0], g % 2 ? gram0_[1] : gram0_[0]};
      row_sums[g + 8] = {sum_[2], g % 2 ? gram1_[3] : gram1_[2]};
    }
  }
};

// Of row t, to *terms: {rstd, -slope, -offset} with d(x) = g - slope * x - offset. For the row's 16 lanes
// together, w = 0 to 15: a lane has its part of the sums that an adapter adds, and one of the kShares that
// warps left, [kShares, 16].
template <int kShares, int kDim>
__device__ __forceinline__ void leave_gradient_terms(float4* terms, const float2* shares, int tile, int t,
                                                     int w, float mean, float rstd, float of_weight,
                                                     float of_normalised) {
  if (w < kShares) {
    const float2 share = shares[(tile * kShares + w) * kTileRows + t];
    of_weight += rstd * share.x;
    of_normalised += rstd * rstd * (share.y - mean * share.x);
  }
  of_weight = row_sum16(of_weight);
  of_normalised = row_sum16(of_normalised);
  if (w == 0) {
    const float slope = rstd * of_normalised * (1.0f / kDim);
    *terms = {rstd, -slope, mean * slope - of_weight * (1.0f / kDim), 0.0f};
  }
}

}  // namespace alore::kernels
