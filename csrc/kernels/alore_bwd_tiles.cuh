// Tiles of the fused backward in shared memory: see alore_bwd_tiles.cu.
#pragma once

#include "kernels/row_moments.cuh"

namespace alore::kernels {

template <typename In, typename Out>
struct TilesParams {
  int64_t num_tokens;
  AdapterDims dims;
  BackwardLayout layout;
  int log_width;  // padded_width = 1 << log_width
  FactorSource factors;
  int row_tiles, stages, key_splits, parts;
  bool norm, add_base;
  const Out* grad_out;
  const In *x, *grad_sum;
  const void *weight, *bias;
  DType affine;
  const float *mean, *rstd;
  DropoutMask dropout;
  In* grad_x;
  float* partial;  // [blocks, scale | down | up]
};

// Rows that lie one after the other in global memory, into shared rows `stride` elements apart; rows from
// live_rows on become zeros. Sixteen bytes a thread at a time.
template <typename T>
__device__ __forceinline__ void copy_rows(T* to, int stride, const T* from, int rows, int live_rows,
                                          int pieces) {
  constexpr int kPiece = 16 / sizeof(T);
  const FastDivide by_row(pieces);
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * pieces; i += blockDim.x) {
    const int row = by_row.quotient(i), column = (i - row * pieces) * kPiece;
    const bool live = row < live_rows;
    copy_async_16(to + row * stride + column, from + (live ? i * kPiece : 0), live);
  }
}

constexpr int max_threads(int max_blocks) { return max_blocks > 4 ? 256 : 384; }

template <typename Out>
__device__ __forceinline__ uint4 dropped(const uint4& grad, const DropoutMask& mask, int64_t element) {
  const Eight m = mask.at(element);
  Eight e = unpack8<Out>(grad);
#pragma unroll
  for (int j = 0; j < 8; ++j) e.v[j] = m.v[j] > 0 ? e.v[j] * m.v[j] : 0.0f;
  return pack8<Out>(e);
}

// Sums over 16 or 32 neighbouring lanes.
__device__ __forceinline__ float lanes_sum(float v, bool all) {
  v = row_sum16(v);
  if (all) v += __shfl_xor_sync(0xffffffffu, v, 16);
  return v;
}

// What a kernel is compiled for, as in alore_fwd.cu: the fast paths fix kBlocks blocks of whole groups, one
// code tile and no dropout.
enum class Path { kNorm, kBare, kGeneral };

// What a block's steps share: the tile's sizes, its memory, what is loaded and what is made once.
template <typename In, typename Out, int kBlocks, Path kPath>
class TilesMemory {
 protected:
  static constexpr bool kWide = std::is_same_v<In, float>, kFast = kPath != Path::kGeneral;

  const TilesParams<In, Out>& p;
  const AdapterDims& d;
  const BackwardLayout& layout;
  unsigned char* const shared;
  const bool norm;
  const int num_blocks, code_tiles, padded, code_stride, log_width;
  const int lane, g, c, warp, warps;
  const int dim, per_block, image_stride;
  const int rows, row_blocks;

  template <typename T>
  __device__ __forceinline__ T* at(int offset) const {
    return reinterpret_cast<T*>(shared + offset);
  }
  // A tile's rows in shared memory.
  struct Stage {
    const In* x;
    const Out* grad;
    const float *means, *rstds;
  };
  __device__ __forceinline__ Stage stage_at(int stage) const {
    unsigned char* const in = shared + layout.stages + stage * layout.stage_bytes;
    return {reinterpret_cast<const In*>(in), reinterpret_cast<const Out*>(in + layout.grad),
            reinterpret_cast<const float*>(in + layout.mean),
            reinterpret_cast<const float*>(in + layout.rstd)};
  }

 public:
  const int64_t tiles;

  __device__ __forceinline__ TilesMemory(const TilesParams<In, Out>& params, unsigned char* memory)
      : p(params),
        d(params.dims),
        layout(params.layout),
        shared(memory),
        norm(kFast ? kPath == Path::kNorm : p.norm),
        num_blocks(kFast ? kBlocks : d.num_blocks),
        code_tiles(kFast ? 1 : d.code_tiles),
        padded(kFast ? kCodeTile : d.padded_width),
        code_stride(kFast ? kCodeTile + 8 : d.code_stride),
        log_width(kFast ? 4 : p.log_width),
        lane(threadIdx.x % 32),
        g(lane / 4),
        c(lane % 4),
        warp(threadIdx.x / 32),
        warps(blockDim.x / 32),
        dim(d.embed_dim),
        per_block(d.groups_per_block),
        image_stride(d.image_stride),
        rows(p.row_tiles * kTileRows),
        row_blocks(p.row_tiles * num_blocks),
        tiles((p.num_tokens + rows - 1) / rows) {}

  // Rows past the end arrive as zeros, gradient included: they add nothing anywhere.
  __device__ __forceinline__ void load(int64_t tile, int stage) const {
    if (tile < tiles) {
      unsigned char* to = shared + layout.stages + stage * layout.stage_bytes;
      const int64_t first = tile * rows;
      const int live_rows = static_cast<int>(min(p.num_tokens - first, static_cast<int64_t>(rows)));
      auto* x_to = reinterpret_cast<In*>(to);
      auto* grad_to = reinterpret_cast<Out*>(to + layout.grad);
      constexpr int kXPiece = 16 / sizeof(In);
      copy_rows(x_to, layout.x_stride, p.x + first * dim, rows, live_rows, dim / kXPiece);
      copy_rows(grad_to, layout.grad_stride, p.grad_out + first * dim, rows, live_rows, dim / 8);
      if (norm && threadIdx.x < rows) {
        const bool live = first + threadIdx.x < p.num_tokens;
        const int64_t from = live ? first + threadIdx.x : 0;
        copy_async_4(to + layout.mean + threadIdx.x * 4, p.mean + from, live);
        copy_async_4(to + layout.rstd + threadIdx.x * 4, p.rstd + from, live);
      }
    }
    copy_async_commit();  // an empty group where there is no tile: the count of pending groups stays uniform
  }

  // The factors, and what the norm folds into them.
  __device__ __forceinline__ void make_images() const {
    auto *down = at<Out>(layout.down), *up = at<Out>(layout.up), *down_out = at<Out>(layout.down_out);
    auto* mixing = at<float>(layout.mixing);
    auto *weight = at<float>(layout.weight), *bias = at<float>(layout.bias);
    auto* affine_image = at<Out>(layout.affine_image);  // [weight, its rest, bias, its rest][columns]
    auto *down_weight = at<float>(layout.down_weight), *down_bias = at<float>(layout.down_bias);
    fill_zero(shared, layout.weight);
    __syncthreads();
    const int factor_size = d.width * d.block_dim;
    const DownPlace down_place(d, p.factors.rank);
    const UpPlace up_place(d);
    scatter(p.factors.down, p.factors.type, factor_size, [&](int i, float v) {
      const CodePlace place = down_place(i);
      const Out rounded = convert<Out>(v);
      down[code_image_at(d, place)] = rounded;
      down_out[output_image_at(d, place)] = rounded;
    });
    scatter(p.factors.up, p.factors.type, factor_size,
            [&](int i, float v) { up[code_image_at(d, up_place(i))] = convert<Out>(v); });
    fill_mixing(mixing, d, p.factors);
    if (norm) {
      fill_affine(weight, p.weight, p.affine, dim, 1.0f);
      fill_affine(bias, p.bias, p.affine, dim, 0.0f);
      __syncthreads();
#pragma unroll 1
      for (int i = threadIdx.x; i < dim; i += blockDim.x) {
        const Out high_weight = convert<Out>(weight[i]), high_bias = convert<Out>(bias[i]);
        affine_image[i] = high_weight;
        affine_image[layout.grad_stride + i] = convert<Out>(weight[i] - convert<float>(high_weight));
        affine_image[2 * layout.grad_stride + i] = high_bias;
        affine_image[3 * layout.grad_stride + i] = convert<Out>(bias[i] - convert<float>(high_bias));
      }
#pragma unroll 1
      for (int i = warp; i < num_blocks << log_width; i += warps) {
        const int block = i >> log_width, w = i & (padded - 1);
        float of_weight = 0.0f, of_bias = 0.0f;
        for (int j = lane; j < d.block_dim; j += 32) {
          const float factor = convert<float>(down[w * image_stride + j]);
          of_weight += weight[block * d.block_dim + j] * factor;
          of_bias += bias[block * d.block_dim + j] * factor;
        }
        of_weight = warp_sum(of_weight);
        of_bias = warp_sum(of_bias);
        if (lane == 0) {
          down_weight[i] = of_weight;
          down_bias[i] = of_bias;
        }
      }
    }
  }

 protected:
  // scale_sum of every thread side by side, one a at a time; a warp adds up an entry: its expert's columns
  // over all rows that the threads stood for.
  __device__ __forceinline__ void leave_scale_sums(const float (&scale_sum)[kBlocks][kBlocks], float* sums,
                                                   float* out) const {
    const int lanes_of_rows = blockDim.x >> log_width, rank = p.factors.rank;
    const FastDivide by_rank(rank);
#pragma unroll
    for (int a = 0; a < kBlocks; ++a) {
      if (a >= num_blocks) break;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        if (b < num_blocks) sums[b * blockDim.x + threadIdx.x] = scale_sum[a][b];
      }
      __syncthreads();
#pragma unroll 1
      for (int i = warp; i < p.factors.num_experts * num_blocks; i += warps) {
        const int e = i / num_blocks, b = i % num_blocks;
        float total = 0.0f;
        for (int q = lane; q < lanes_of_rows * rank; q += 32) {
          const int r = by_rank.quotient(q);
          total += sums[b * blockDim.x + (r << log_width) + e * rank + q - r * rank];
        }
        total = warp_sum(total);
        if (lane == 0) out[(e * num_blocks + a) * num_blocks + b] = total;
      }
      __syncthreads();
    }
  }
};

}  // namespace alore::kernels
