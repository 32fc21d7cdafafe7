// A layer norm's statistics of 16 rows in shared memory, columns dealt out to warps: each warp's mean and
// squares around it as products, then the warps' shares merged.
#pragma once

#include "kernels/alore_layout.h"
#include "kernels/alore_tile.cuh"

namespace alore::kernels {

// Mean^2 over variance up to which uncentred sums lose at most 4 bits.
inline constexpr float kMaxShift = 16.0f;

// Sums over the 16 lanes that stand for a row.
__device__ __forceinline__ float row_sum16(float v) {
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// The exact way: two passes over a warp's columns, two lanes a row.
template <typename T, int kColumns, int kRowBytes>
__device__ __noinline__ void centred_moments(const unsigned char* rows, float2* moments) {
  __syncwarp();  // behind the uncentred ones, which other lanes have written
  const int lane = threadIdx.x % 32;
  const T* row = reinterpret_cast<const T*>(rows + lane % 16 * kRowBytes) + lane / 16 * (kColumns / 2);
  float sum = 0.0f, squares = 0.0f;
  for (int j = 0; j < kColumns / 2; ++j) sum += convert<float>(row[j]);
  const float mean = (sum + __shfl_xor_sync(0xffffffffu, sum, 16)) * (1.0f / kColumns);
  for (int j = 0; j < kColumns / 2; ++j) {
    const float d = convert<float>(row[j]) - mean;
    squares += d * d;
  }
  squares += __shfl_xor_sync(0xffffffffu, squares, 16);
  if (lane < 16) moments[lane] = {mean, squares};
}

// Of a warp's kColumns columns: sums by products with ones and of rows with themselves.
template <typename T, int kColumns, int kRowBytes>
class WarpMoments {
  float sum_[4] = {}, gram0_[4] = {}, gram1_[4] = {};

 public:
  // 16 columns, as the A operand.
  __device__ __forceinline__ void add(const uint32_t (&x)[4]) {
    const uint32_t ones = pack2<T>(1.0f, 1.0f);
    mma<T>(sum_, x, ones, ones);
    mma<T>(gram0_, x, x[0], x[2]);
    mma<T>(gram1_, x, x[1], x[3]);
  }

  // {mean, squares around it} of each row, to moments[16]. The squares come uncentred: where the mean
  // outweighs the spread enough to cost precision, the warp goes over its columns, at `rows`, again.
  __device__ __forceinline__ void leave(const unsigned char* rows, float2* moments, int g, int c) const {
    const float mean0 = sum_[0] * (1.0f / kColumns), mean1 = sum_[2] * (1.0f / kColumns);
    const float shift0 = sum_[0] * mean0, shift1 = sum_[2] * mean1;
    const float squares0 = fmaxf((g % 2 ? gram0_[1] : gram0_[0]) - shift0, 0.0f);
    const float squares1 = fmaxf((g % 2 ? gram1_[3] : gram1_[2]) - shift1, 0.0f);
    const bool is_diagonal = c == g / 2;  // this lane of a row's four has the diagonals' entries g
    if (is_diagonal) {
      moments[g] = {mean0, squares0};
      moments[g + 8] = {mean1, squares1};
    }
    const bool precise = shift0 <= kMaxShift * squares0 && shift1 <= kMaxShift * squares1;
    if (__any_sync(0xffffffffu, is_diagonal && !precise))
      centred_moments<T, kColumns, kRowBytes>(rows, moments);
  }
};

struct RowStatistics {
  float mean, rstd;
  float scaling;  // of what is left when the mean is taken away
};

// Of row t, from the shares that kShares warps left, [kShares, 16], by Chan's update: no cancellation where
// the mean is large. For the row's 16 lanes together, w = 0 to 15.
template <int kShares, int kColumns>
__device__ __forceinline__ RowStatistics row_statistics(const float2* shares, int t, int w, float eps) {
  const bool has_share = w < kShares;
  const float2 share = shares[(has_share ? w : 0) * kTileRows + t];
  const float mean = row_sum16(has_share ? share.x : 0.0f) * (1.0f / kShares);
  const float apart = share.x - mean;
  const float squares = row_sum16(has_share ? share.y + apart * apart * kColumns : 0.0f);
  const float variance = squares * (1.0f / (kShares * kColumns)) + eps;
  float rstd = rsqrtf(variance);
  rstd *= 1.5f - 0.5f * variance * rstd * rstd;  // to the last bit, which the approximation misses
  // Of equal values nothing is left, but the differences below would leave a rounding times rstd, which
  // eps alone bounds.
  return {mean, rstd, squares == 0.0f ? 0.0f : rstd};
}

}  // namespace alore::kernels
