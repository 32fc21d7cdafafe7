// Pieces that the pipelined forward and backward share.
//
// Both fold the norm into the products. With n = (x - mean) * rstd and base = n * weight + bias,
//   Z = base @ down = rstd * (x @ D - mean * sum(D)) + bias @ down,    D = weight * down
// so the tensor cores take x as it was read, by ldmatrix, and no normalised row is made for them. D is
// rounded to 16 bits, base is not. sum(D) adds the same rounded values, so that a large mean costs little,
// 2^-24 of |mean| * rstd: below 2^-10 wherever a row's 16-bit values differ at all. Rows of equal values are
// exact in forward. In backward they do no harm while |mean| * rstd is below 1e4 (2.5 under an eps of 1e-6
// gives 2.5e3, under 1e-12 2.5e6); beyond that their terms of d(down), which should cancel, drown the
// others'.
#pragma once

#include <iterator>
#include <utility>

#include "kernels/alore_pipelined_layout.h"
#include "kernels/alore_tile.cuh"
#include "kernels/row_gradients.cuh"

namespace alore::kernels {

// Where a column's weight stands: by its group and the lane that holds it in a product's result, columns 2c
// and 2c + 1 of each of four tiles of 8.
__device__ __forceinline__ int by_lane(int column) {
  return (column & ~31) + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
}

// Code columns of rows 2, 3, 6 and 7 of 8 change halves: fp32 codes are stored without bank conflicts.
__device__ __forceinline__ int code_column(int row, int w) { return w ^ (row & 2) << 2; }

// The result of a code product of 16 rows, to [16, 16] floats.
__device__ __forceinline__ void store_code(float* code, const float (&z)[2][4], int g, int c) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    float* to = code + g * kCodeTile + code_column(g, n * 8 + 2 * c);
    *reinterpret_cast<float2*>(to) = {z[n][0], z[n][1]};
    *reinterpret_cast<float2*>(to + 8 * kCodeTile) = {z[n][2], z[n][3]};
  }
}

// Calls f(std::integral_constant<int, i>) with the entry of the table that has this width.
template <const auto& kShapes, typename F>
void dispatch_width(int64_t embed_dim, F&& f) {
  const bool found = [&]<size_t... i>(std::index_sequence<i...>) {
    return ((kShapes[i].groups * kGroupColumns == embed_dim && (f(std::integral_constant<int, i>{}), true)) ||
            ...);
  }(std::make_index_sequence<std::size(kShapes)>{});
  if (!found)
    throw std::runtime_error("no pipelined ALoRE kernel for embed_dim " + std::to_string(embed_dim));
}

struct Four {
  float v[kPipelinedBlocks];
};

__device__ __forceinline__ Four shared4(const float* p) {
  const float4 q = *reinterpret_cast<const float4*>(p);
  return {{q.x, q.y, q.z, q.w}};
}

// Values of a vector on their way from global memory: loaded together, used later.
template <int kCount>
struct VectorBatch {
  uint32_t bits[kCount];
  __device__ __forceinline__ void load(const void* source, DType type, int count) {
    const bool wide = type == DType::kFloat32;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int i = threadIdx.x + u * blockDim.x;
      bits[u] = i < count ? factor_bits(source, wide, i) : 0;
    }
  }
  template <typename Put>
  __device__ __forceinline__ void put(DType type, int count, Put put_value) const {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int i = threadIdx.x + u * blockDim.x;
      if (i < count) put_value(i, factor_value(bits[u], type));
    }
  }
};

// The norm's weight or bias, `missing` where there is none.
template <int kDim, int kThreads>
struct AffineBatch {
  VectorBatch<ceil_div(kDim, kThreads)> values;
  __device__ __forceinline__ void load(const void* vector, DType type) {
    if (vector != nullptr) values.load(vector, type, kDim);
  }
  template <typename Put>
  __device__ __forceinline__ void put(const void* vector, DType type, float missing, Put put_value) const {
    if (vector != nullptr) {
      values.put(type, kDim, put_value);
    } else {
      for (int i = threadIdx.x; i < kDim; i += kThreads) put_value(i, missing);
    }
  }
};

struct AffineSource {
  const void *weight, *bias;
  DType type;
};

// A factor's entries (w, j), code column and block column, dealt out to a block's threads: a thread has one j
// and every kStep-th w, so that what belongs to a column is read once.
template <int kBlockDim, int kThreads>
struct FactorWalk {
  static_assert(kThreads % kBlockDim == 0);
  static constexpr int kStep = kThreads / kBlockDim, kCount = ceil_div(kCodeTile, kStep);
  const int j = threadIdx.x % kBlockDim, first = threadIdx.x / kBlockDim;
  const FastDivide by_rank;
  const int rank, width;
  __device__ FactorWalk(int num_experts, int r) : by_rank(r), rank(r), width(num_experts * r) {}
  // In down [num_experts, block_dim, rank], and in up [num_experts, rank, block_dim].
  __device__ __forceinline__ int in_down(int w) const {
    const int e = by_rank.quotient(w);
    return (e * kBlockDim + j) * rank + w - e * rank;
  }
  __device__ __forceinline__ int in_up(int w) const { return w * kBlockDim + j; }
};

// Makes the factors' images at `shared`; all values are on their way before the first is used. Every weight
// and bias is also given to put_affine(column, value, is_bias). `scratch` is FactorImages::scratch_bytes of
// memory, free again when this returns.
template <typename T, int kDim, int kThreads, bool kNorm, typename PutAffine>
__device__ __forceinline__ void make_images(unsigned char* shared, float* scratch, const FactorSource& f,
                                            const AffineSource& affine, PutAffine put_affine) {
  constexpr FactorImages kI(kDim, kNorm);
  constexpr int kBlocks = kPipelinedBlocks, kBlockDim = kDim / kBlocks;
  using Walk = FactorWalk<kBlockDim, kThreads>;
  const Walk walk(f.num_experts, f.rank);
  const bool wide = f.type == DType::kFloat32;
  const int scale_size = f.num_experts * kBlocks * kBlocks;
  uint32_t down_bits[Walk::kCount] = {}, up_bits[Walk::kCount] = {};
  VectorBatch<1> scale_values;
  AffineBatch<kDim, kThreads> weights, biases;
  static_assert(kThreads >= kCodeTile * kBlocks * 4);
#pragma unroll
  for (int u = 0; u < Walk::kCount; ++u) {
    const int w = walk.first + u * Walk::kStep;
    if (w >= walk.width) continue;
    down_bits[u] = factor_bits(f.down, wide, walk.in_down(w));
    up_bits[u] = factor_bits(f.up, wide, walk.in_up(w));
  }
  scale_values.load(f.scale, f.type, scale_size);
  if constexpr (kNorm) {
    weights.load(affine.weight, affine.type);
    biases.load(affine.bias, affine.type);
  }

  auto *down = reinterpret_cast<T*>(shared + kI.down), *up = reinterpret_cast<T*>(shared + kI.up);
  auto *weight = reinterpret_cast<float*>(shared + kI.weight),
       *mixing = reinterpret_cast<float*>(shared + kI.mixing);
  float *plain_down = scratch, *bias = scratch + kCodeTile * kBlockDim;
  for (int i = threadIdx.x; i < kCodeTile * FactorImages::kMixingStride; i += kThreads) mixing[i] = 0.0f;
  if constexpr (kNorm) {
    weights.put(affine.weight, affine.type, 1.0f, [&](int i, float v) {
      weight[by_lane(i)] = v;
      put_affine(i, v, false);
    });
    biases.put(affine.bias, affine.type, 0.0f, [&](int i, float v) {
      bias[i] = v;
      put_affine(i, v, true);
    });
  }
  __syncthreads();
  float of_block[kBlocks];  // the column's weight in every block
  if constexpr (kNorm) {
#pragma unroll
    for (int a = 0; a < kBlocks; ++a) of_block[a] = weight[a * kBlockDim + by_lane(walk.j)];
  }
#pragma unroll
  for (int u = 0; u < Walk::kCount; ++u) {
    const int w = walk.first + u * Walk::kStep;  // zeros from `width` on
    if (w >= kCodeTile) break;
    up[w * kI.up_stride + walk.j] = convert<T>(factor_value(up_bits[u], f.type));
    const float v = factor_value(down_bits[u], f.type);
    T* to = down + w * kI.down_stride + walk.j;
    if constexpr (kNorm) {
      plain_down[w * kBlockDim + walk.j] = v;
#pragma unroll
      for (int a = 0; a < kBlocks; ++a) to[a * kBlockDim] = convert<T>(of_block[a] * v);
    } else {
      *to = convert<T>(v);
    }
  }
  scale_values.put(f.type, scale_size, [&](int i, float v) {
    const int e = i / (kBlocks * kBlocks), ab = i % (kBlocks * kBlocks);
    for (int k = 0; k < f.rank; ++k) mixing[(e * f.rank + k) * FactorImages::kMixingStride + ab] = v;
  });
  __syncthreads();
  if constexpr (kNorm) {
    // Sums over a block's columns, some threads each.
    constexpr int kSums = kCodeTile * kBlocks;
    constexpr int kLanes = kThreads >= kSums * 8 && kBlockDim % 64 == 0 ? 8 : 4;
    if (threadIdx.x < kSums * kLanes) {
      const int q = threadIdx.x % kLanes, w = threadIdx.x / kLanes % kCodeTile;
      const int a = threadIdx.x / (kLanes * kCodeTile);
      const T* row = down + w * kI.down_stride + a * kBlockDim;
      float sum = 0.0f, of_bias = 0.0f;
#pragma unroll 3
      for (int j = q * 8; j < kBlockDim; j += kLanes * 8) {
        const Eight d = shared8(row + j), o = shared8(bias + a * kBlockDim + j);
        const Eight v = shared8(plain_down + w * kBlockDim + j);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          sum += d.v[e];
          of_bias += o.v[e] * v.v[e];
        }
      }
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        of_bias += __shfl_xor_sync(0xffffffffu, of_bias, offset);
      }
      if (q == 0) {
        reinterpret_cast<float*>(shared + kI.down_mean)[w * kBlocks + a] = sum;
        reinterpret_cast<float*>(shared + kI.down_bias)[w * kBlocks + a] = of_bias;
      }
    }
    __syncthreads();
  }
}

// Copies rows [first, first + kRows) of each of `sources` into rows kRowBytes apart, `apart` bytes from one
// source to the next; rows past the end become zeros. Sixteen bytes a thread at a time.
template <int kDim, int kRows, int kThreads, typename T, int kSources>
__device__ __forceinline__ void copy_rows_async(unsigned char* to, int apart, int thread,
                                                const T* const (&sources)[kSources], int64_t first,
                                                int64_t num_tokens) {
  constexpr int kPieces = kDim / 8, kStep = kThreads / kPieces, kRowBytes = (kDim + 8) * 2;
  static_assert(kThreads % kPieces == 0 && kRows % kStep == 0);
  const int row = thread / kPieces, piece = thread % kPieces;
  const int64_t from = (first + row) * kDim + piece * 8;
  const int live_rows = static_cast<int>(min(num_tokens - first, static_cast<int64_t>(kRows))) - row;
  to += row * kRowBytes + piece * 16;
#pragma unroll
  for (int i = 0; i < kRows; i += kStep) {
    const bool live = i < live_rows;
#pragma unroll
    for (int s = 0; s < kSources; ++s)
      copy_async_16(to + s * apart + i * kRowBytes, sources[s] + (live ? from + i * kDim : 0), live);
  }
}

// Takes tiles `tile`, `tile + step`, ... of `count` through three stages of shared memory, the first at
// `first`: one tile whose results are written (outputs), the next, whose codes are made in the same phase,
// and one on its way. A barrier, mixing, a barrier. prepare(stage) runs while the first two tiles are on
// their way, with the third stage as scratch memory.
template <int kStageBytes, typename Kernel, typename Prepare>
__device__ __forceinline__ void run_stages(Kernel& kernel, int64_t tile, int64_t count, int64_t step,
                                           int first, Prepare prepare) {
  int now = first, next = now + kStageBytes, last = next + kStageBytes;
  kernel.load(tile, count, now);
  kernel.load(tile + step, count, next);
  prepare(last);
  if (tile >= count) return;
  copy_async_wait<1>();
  kernel.sync();
  kernel.codes(now);
  kernel.sync();
  kernel.mixing(tile, now);
  copy_async_wait<0>();
  kernel.sync();
#pragma unroll 1
  for (; tile < count; tile += step) {
    kernel.load(tile + 2 * step, count, last);
    kernel.outputs(tile, now);
    const bool more = tile + step < count;
    if (more) kernel.codes(next);
    kernel.sync();
    if (more) kernel.mixing(tile + step, next);
    copy_async_wait<0>();
    kernel.sync();
    const int free = now;
    now = next;
    next = last;
    last = free;
  }
}

// A warp's 16 rows of kItems * 32 columns, made in shared memory, to global memory; `rows` live ones.
template <int kDim, int kItems, typename T>
__device__ __forceinline__ void store_rows(const unsigned char* from, T* to, int lane, int64_t rows) {
  constexpr int kPieces = kItems * 4, kStep = 32 / kPieces, kRowBytes = (kDim + 8) * 2;
  const int row = lane / kPieces, piece = lane % kPieces;
  from += row * kRowBytes + piece * 16;
  to += row * kDim + piece * 8;
#pragma unroll
  for (int i = 0; i < kTileRows; i += kStep) {
    const uint4 v = load_shared_16(from + i * kRowBytes);
    if (row + i < rows) store_16(to + i * kDim, v);
  }
}

}  // namespace alore::kernels
