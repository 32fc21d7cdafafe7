// Backward of the fused ALoRE adapter for the shapes that backbones are trained with (kPipelinedBackward):
// the results of alore_bwd_tiles.cu by half of its instructions.
//
// Behind a norm (alore_pipelined.cuh) the gradients too are products of x as it was read: with R = rstd * dZ,
//   d(down) = base^T dZ = weight * (x^T R - sum_t mean_t R_t) + bias * sum_t dZ_t
//   d(x)    = g - mean(g) - n * mean(g * n),    g = rstd * weight * d(base) = rstd * weight * grad_out + R @
//   D^T
// R is rounded to 16 bits, and the sums that the mean takes away are of the same rounded values. The means
// over a row need no d(base): their adapter's part is a sum over the code, of R * sum(D) and R * (Z - bias @
// down). Their other part takes weight * grad_out in 16 bits, whose roundings average out over a row.
//
// Three tiles are in shared memory: one whose results are written (`outputs`), the next, whose codes are made
// in the same phase (`codes`), and one on its way. A barrier, mixing over blocks, a barrier.
#include "kernels/alore_fused.cuh"
#include "kernels/alore_pipelined.cuh"

namespace alore::kernels {
namespace {

template <typename T>
struct PipelinedParams {
  int64_t num_tokens;
  FactorSource factors;
  bool add_base;  // always behind a norm
  const T *grad_out, *x;
  AffineSource affine;
  const float *mean, *rstd;
  T* grad_x;       // or null
  float* partial;  // [blocks, scale | down | up]
};

template <typename T, PipelinedShape kShape, bool kNorm>
class PipelinedBackward {
  static constexpr PipelinedBackwardLayout kL{kShape, kNorm};
  static constexpr FactorImages kI = kL.images;
  static constexpr int kBlocks = kPipelinedBlocks, kDim = kL.dim, kBlockDim = kL.block_dim;
  static constexpr int kItems = kL.items, kRowTiles = kL.row_tiles, kCodeStride = FactorImages::kCodeStride;
  static constexpr int kRowBytes = kL.row_stride * 2, kCodeSize = kTileRows * kCodeTile;

  const PipelinedParams<T>& p;
  unsigned char* shared;
  const int lane, g, c, warp, row_tile, block, first_group;
  const uint32_t rows_lane, down_rows, down_columns, up_columns;  // this lane's part of ldmatrix addresses

  float up_sum[kItems][4][4] = {}, down_sum[kItems][4][4] = {};  // [16 code columns, 32 columns] an item
  float scale_sum[kBlocks][kBlocks] = {};                        // of code column threadIdx.x % 16
  float mean_sum[kBlocks] = {}, code_sum[kBlocks] = {};          // sum_t mean_t R_t and sum_t dZ_t

  template <typename U>
  __device__ U* at(int offset) const {
    return reinterpret_cast<U*>(shared + offset);
  }

 public:
  __device__ PipelinedBackward(const PipelinedParams<T>& params, unsigned char* memory)
      : p(params),
        shared(memory),
        lane(threadIdx.x % 32),
        g(lane / 4),
        c(lane % 4),
        warp(threadIdx.x / 32),
        row_tile(warp / kL.per_row_tile),
        block(warp % kL.per_row_tile / kL.splits),
        first_group(warp % kL.per_row_tile * kItems),
        rows_lane(operand_rows(lane, kRowBytes)),
        down_rows(shared_address(memory + kI.down) + operand_rows(lane, kI.down_stride * 2)),
        down_columns(shared_address(memory + kI.down) + operand_columns(lane, kI.down_stride * 2)),
        up_columns(shared_address(memory + kI.up) + operand_columns(lane, kI.up_stride * 2)) {}

  __device__ __forceinline__ void run() {
    const int64_t count = (p.num_tokens + kL.rows - 1) / kL.rows, step = gridDim.x;
    static_assert(FactorImages::scratch_bytes(kDim) <= kL.stage_bytes);
    run_stages<kL.stage_bytes>(*this, blockIdx.x, count, step, kL.stages, [&](int scratch) {
      make_images<T, kDim, kL.threads, kNorm>(shared, at<float>(scratch), p.factors, p.affine,
                                              [&](int i, float v, bool is_bias) {
                                                if (!is_bias) at<T>(kL.weight16)[by_lane(i)] = convert<T>(v);
                                              });
    });
    finish();
  }

  // The steps of run_stages.

  __device__ __forceinline__ void sync() const { __syncthreads(); }

  // Rows past the end arrive as zeros, gradient, mean and rstd included: they add nothing anywhere.
  __device__ __forceinline__ void load(int64_t tile, int64_t count, int stage) const {
    if (tile < count) {
      const int64_t first = tile * kL.rows;
      const T* const sources[2] = {p.x, p.grad_out};
      copy_rows_async<kDim, kL.rows, kL.threads>(shared + stage, kL.grad, threadIdx.x, sources, first,
                                                 p.num_tokens);
      if (kNorm && threadIdx.x < 2 * kL.rows) {
        const int i = threadIdx.x % kL.rows;
        const bool live = first + i < p.num_tokens, is_mean = threadIdx.x < kL.rows;
        copy_async_4(shared + stage + (is_mean ? kL.mean : kL.rstd) + i * 4,
                     (is_mean ? p.mean : p.rstd) + (live ? first + i : 0), live);
      }
    }
    copy_async_commit();
  }

  // This warp's share of x @ D and grad_out @ up^T, and of the sums over a row that the norm's gradient
  // needs: of weight * grad_out, and of x * weight * grad_out as the diagonal of a product of rows.
  __device__ __forceinline__ void codes(int stage) const {
    const uint32_t x_at =
        shared_address(shared) + stage + row_tile * kTileRows * kRowBytes + rows_lane + first_group * 64;
    float z[2][4] = {}, dh[2][4] = {};
    WarpGradients<T> sums;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int column = (first_group + k) * kGroupColumns, local = column - block * kBlockDim;
      uint4 weights{};
      if constexpr (kNorm) weights = load_shared_16(at<T>(kL.weight16) + column + c * 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t x[4], grad[4], b[4];
        load_matrices(x, x_at + k * 64 + half * 32);
        load_matrices(grad, x_at + kL.grad + k * 64 + half * 32);
        load_matrices(b, down_columns + (kNorm ? column : local) * 2 + half * 32);
        mma<T>(z[0], x, b[0], b[1]);
        mma<T>(z[1], x, b[2], b[3]);
        load_matrices(b, up_columns + local * 2 + half * 32);
        mma<T>(dh[0], grad, b[0], b[1]);
        mma<T>(dh[1], grad, b[2], b[3]);
        if constexpr (kNorm) sums.add(grad, x, weights, half);
      }
    }
    store_code(at<float>(kL.code) + warp * kCodeSize, z, g, c);
    store_code(at<float>(kL.grad_mixed) + warp * kCodeSize, dh, g, c);
    if constexpr (kNorm) sums.leave(at<float2>(kL.row_sums) + warp * kTileRows, g, c);
  }

  // H and dZ of a code column of a row, a thread each; d(scale), and what the norm's gradient takes from
  // them.
  __device__ __forceinline__ void mixing(int64_t, int stage) {
    const auto *means = at<float>(stage + kL.mean), *rstds = at<float>(stage + kL.rstd);
    const int w = threadIdx.x % kCodeTile;
#pragma unroll
    for (int first = 0; first < kL.rows * kCodeTile; first += kL.threads) {
      const int row = (first + static_cast<int>(threadIdx.x)) / kCodeTile;
      if (kL.threads > kL.mixers && row >= kL.rows) break;
      const int tile = row / kTileRows, t = row % kTileRows;
      const float mean = kNorm ? means[row] : 0.0f, rstd = kNorm ? rstds[row] : 1.0f;
      Four z{}, dh{};
      const int from = tile * kL.per_row_tile * kCodeSize + t * kCodeTile + code_column(t, w);
#pragma unroll
      for (int a = 0; a < kBlocks; ++a) {
#pragma unroll
        for (int s = 0; s < kL.splits; ++s) {
          z.v[a] += at<float>(kL.code)[from + (a * kL.splits + s) * kCodeSize];
          dh.v[a] += at<float>(kL.grad_mixed)[from + (a * kL.splits + s) * kCodeSize];
        }
      }
      Four column_sum{}, normalised = z;
      if constexpr (kNorm) {
        column_sum = shared4(at<float>(kI.down_mean) + w * kBlocks);
        const Four column_bias = shared4(at<float>(kI.down_bias) + w * kBlocks);
#pragma unroll
        for (int a = 0; a < kBlocks; ++a) {
          normalised.v[a] = rstd * (z.v[a] - mean * column_sum.v[a]);
          z.v[a] = normalised.v[a] + column_bias.v[a];
        }
      }
      Four h{}, dz{};
#pragma unroll
      for (int a = 0; a < kBlocks; ++a) {
        const Four s = shared4(at<float>(kI.mixing) + w * FactorImages::kMixingStride + a * kBlocks);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          h.v[b] += s.v[b] * z.v[a];
          dz.v[a] += s.v[b] * dh.v[b];
          scale_sum[a][b] += z.v[a] * dh.v[b];
        }
      }
      float of_weight = 0.0f, of_normalised = 0.0f;
      const int to = (tile * kBlocks * kTileRows + t) * kCodeStride + w;
#pragma unroll
      for (int a = 0; a < kBlocks; ++a) {
        const T r = convert<T>(kNorm ? rstd * dz.v[a] : dz.v[a]);
        at<T>(kL.mixed)[to + a * kTileRows * kCodeStride] = convert<T>(h.v[a]);
        at<T>(kL.grad_code)[to + a * kTileRows * kCodeStride] = r;
        if constexpr (kNorm) {
          const float rounded = convert<float>(r);
          mean_sum[a] += mean * rounded;
          code_sum[a] += dz.v[a];
          of_weight += rounded * column_sum.v[a];
          of_normalised += rounded * normalised.v[a];
        }
      }
      if constexpr (kNorm) {
        leave_gradient_terms<kL.per_row_tile, kDim>(at<float4>(kL.row_terms) + row, at<float2>(kL.row_sums),
                                                    tile, t, w, mean, rstd, of_weight, of_normalised);
      }
    }
  }

  // d(up) and d(down) of this warp's columns, and d(x), which leaves by way of grad_out's place in the stage.
  __device__ __forceinline__ void outputs(int64_t tile, int stage) {
    unsigned char* const rows = shared + stage + row_tile * kTileRows * kRowBytes;
    const uint32_t x_at = shared_address(rows) + rows_lane + first_group * 64;
    const int codes_at = (row_tile * kBlocks + block) * kTileRows * kCodeStride;
    uint32_t h[4], r[4], r_rows[4];
    load_a_transposed(h, at<T>(kL.mixed) + codes_at, kCodeStride, lane);
    load_a_transposed(r, at<T>(kL.grad_code) + codes_at, kCodeStride, lane);
    load_a(r_rows, at<T>(kL.grad_code) + codes_at, kCodeStride, lane);
    float4 terms0{}, terms1{};
    if constexpr (kNorm) {
      terms0 = at<float4>(kL.row_terms)[row_tile * kTileRows + g];
      terms1 = at<float4>(kL.row_terms)[row_tile * kTileRows + g + 8];
    }
    const float base_share = p.add_base ? 1.0f : 0.0f;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int column = (first_group + k) * kGroupColumns;
      Eight weight;
      if constexpr (kNorm) weight = shared8(at<float>(kI.weight) + column + c * 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t here = x_at + k * 64 + half * 32;
        uint32_t b[4];
        load_matrices_transposed(b, here + kL.grad);
        mma<T>(up_sum[k][2 * half], h, b[0], b[1]);
        mma<T>(up_sum[k][2 * half + 1], h, b[2], b[3]);
        load_matrices_transposed(b, here);
        mma<T>(down_sum[k][2 * half], r, b[0], b[1]);
        mma<T>(down_sum[k][2 * half + 1], r, b[2], b[3]);
        if (p.grad_x == nullptr) continue;

        uint32_t x[4], grad[4];
        load_matrices(grad, here + kL.grad);
        if constexpr (kNorm) load_matrices(x, here);
        load_matrices_transposed(b,
                                 down_rows + (kNorm ? column : column - block * kBlockDim) * 2 + half * 32);
        T* to = reinterpret_cast<T*>(rows + kL.grad) + g * kL.row_stride + column + half * 16 + 2 * c;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float out[4];
          const float2 grad0 = unpack2<T>(grad[2 * n]), grad1 = unpack2<T>(grad[2 * n + 1]);
          if constexpr (kNorm) {
            const float2 x0 = unpack2<T>(x[2 * n]), x1 = unpack2<T>(x[2 * n + 1]);
            const float w0 = weight.v[(2 * half + n) * 2], w1 = weight.v[(2 * half + n) * 2 + 1];
            out[0] = grad0.x * w0 * terms0.x + (x0.x * terms0.y + terms0.z);
            out[1] = grad0.y * w1 * terms0.x + (x0.y * terms0.y + terms0.z);
            out[2] = grad1.x * w0 * terms1.x + (x1.x * terms1.y + terms1.z);
            out[3] = grad1.y * w1 * terms1.x + (x1.y * terms1.y + terms1.z);
          } else {
            out[0] = grad0.x * base_share, out[1] = grad0.y * base_share;
            out[2] = grad1.x * base_share, out[3] = grad1.y * base_share;
          }
          mma<T>(out, r_rows, b[2 * n], b[2 * n + 1]);
          *reinterpret_cast<uint32_t*>(to + n * 8) = pack2<T>(out[0], out[1]);
          *reinterpret_cast<uint32_t*>(to + 8 * kL.row_stride + n * 8) = pack2<T>(out[2], out[3]);
        }
      }
    }
    if (p.grad_x == nullptr) return;
    __syncwarp();
    const int64_t first = tile * kL.rows + row_tile * kTileRows;
    store_rows<kDim, kItems>(rows + kL.grad + first_group * 64,
                             p.grad_x + first * kDim + first_group * kGroupColumns, lane,
                             p.num_tokens - first);
  }

 private:
  // The block's sums, added in a fixed order; d(down) as [width, block_dim], like up.
  __device__ __forceinline__ void finish() {
    allow_next_launch();
    AffineBatch<kDim, kL.threads> biases;
    if constexpr (kNorm) biases.load(p.affine.bias, p.affine.type);
    constexpr int kSlots = kRowTiles * kBlocks, kSlotSize = kCodeTile * kL.sum_stride;
    auto *sums = at<float>(kL.sums), *bias = at<float>(kL.bias);
    const int own = (row_tile * kBlocks + block) * kSlotSize;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int local = (first_group + k) * kGroupColumns - block * kBlockDim + 2 * c;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          float* to = sums + own + (g + u * 8) * kL.sum_stride + local + n * 8;
          *reinterpret_cast<float2*>(to) = {down_sum[k][n][2 * u], down_sum[k][n][2 * u + 1]};
          *reinterpret_cast<float2*>(to + kSlots * kSlotSize) = {up_sum[k][n][2 * u],
                                                                 up_sum[k][n][2 * u + 1]};
        }
      }
    }
    auto* of_threads = at<float>(kL.thread_sums);
    if (threadIdx.x < kL.mixers) {
      float* to = of_threads + threadIdx.x;
#pragma unroll
      for (int a = 0; a < kBlocks; ++a) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) to[(a * kBlocks + b) * kL.mixers] = scale_sum[a][b];
        to[(16 + a) * kL.mixers] = mean_sum[a];
        to[(20 + a) * kL.mixers] = code_sum[a];
      }
    }
    if constexpr (kNorm) biases.put(p.affine.bias, p.affine.type, 0.0f, [&](int i, float v) { bias[i] = v; });
    __syncthreads();

    const FactorSource& f = p.factors;
    const int scale_size = f.num_experts * kBlocks * kBlocks,
              factor_size = f.num_experts * f.rank * kBlockDim;
    float* out = p.partial + static_cast<int64_t>(blockIdx.x) * (scale_size + 2 * factor_size);
    auto* totals = at<float>(kL.totals);  // of mean_sum and of code_sum
    if (kNorm && threadIdx.x < 2 * kBlocks * kCodeTile) {
      const float* column = of_threads + (16 + threadIdx.x / kCodeTile) * kL.mixers + threadIdx.x % kCodeTile;
      float total = 0.0f;
#pragma unroll 8
      for (int i = 0; i < kL.mixers; i += kCodeTile) total += column[i];
      totals[threadIdx.x] = total;
    }
    // d(scale): an expert's columns over all rows that the threads stood for, a warp an entry.
    const FastDivide by_rank(f.rank);
#pragma unroll 1
    for (int i = warp; i < scale_size; i += kL.warps) {
      const float* entry =
          of_threads + i % (kBlocks * kBlocks) * kL.mixers + i / (kBlocks * kBlocks) * f.rank;
      float total = 0.0f;
#pragma unroll 2
      for (int q = lane; q < kL.mixers / kCodeTile * f.rank; q += 32) {
        const int row = by_rank.quotient(q);
        total += entry[row * kCodeTile + q - row * f.rank];
      }
      total = warp_sum(total);
      if (lane == 0) out[i] = total;
    }
    __syncthreads();

    using Walk = FactorWalk<kBlockDim, kL.threads>;
    const Walk walk(f.num_experts, f.rank);
    Four weights, columns_bias;
    if constexpr (kNorm) {
#pragma unroll
      for (int a = 0; a < kBlocks; ++a) {
        weights.v[a] = at<float>(kI.weight)[a * kBlockDim + by_lane(walk.j)];
        columns_bias.v[a] = bias[a * kBlockDim + walk.j];
      }
    }
#pragma unroll
    for (int u = 0; u < Walk::kCount; ++u) {
      const int w = walk.first + u * Walk::kStep;
      if (w >= walk.width) break;
      const float* down_at = sums + w * kL.sum_stride + walk.j;
      const float* up_at = down_at + kSlots * kSlotSize;
      float up = 0.0f, down = 0.0f;
#pragma unroll
      for (int a = 0; a < kBlocks; ++a) {
        float of_block = 0.0f;
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
          up += up_at[(tile * kBlocks + a) * kSlotSize];
          of_block += down_at[(tile * kBlocks + a) * kSlotSize];
        }
        if constexpr (kNorm) {
          of_block = weights.v[a] * (of_block - totals[a * kCodeTile + w]) +
                     columns_bias.v[a] * totals[(kBlocks + a) * kCodeTile + w];
        }
        down += of_block;
      }
      out[scale_size + walk.in_up(w)] = down;
      out[scale_size + factor_size + walk.in_up(w)] = up;
    }
  }
};

template <typename T, int kIndex, bool kNorm>  // of kPipelinedBackward
__global__ void __launch_bounds__(PipelinedSizes(kPipelinedBackward[kIndex]).threads, 1)
    alore_backward_pipelined_kernel(const __grid_constant__ PipelinedParams<T> p) {
  extern __shared__ __align__(128) unsigned char shared[];
  wait_for_launches_before();
  // Not compiled where no block may have that much shared memory: no plan chooses it there.
  if constexpr (PipelinedBackwardLayout(kPipelinedBackward[kIndex], kNorm).bytes <= kMostSharedBytes)
    PipelinedBackward<T, kPipelinedBackward[kIndex], kNorm>(p, shared).run();
}

template <typename T, bool kNorm>
void launch(const CudaContext& context, const AloreShape& s, const AloreBackwardPlan& plan,
            const AloreBackwardArgs& a) {
  const PipelinedParams<T> params{s.num_tokens,
                                  factors_of(s, a.adapter),
                                  s.add_base,
                                  static_cast<const T*>(a.grad_out),
                                  static_cast<const T*>(a.sum),
                                  {a.norm.weight, a.norm.bias, s.affine},
                                  a.mean,
                                  a.rstd,
                                  static_cast<T*>(a.grad_x),
                                  static_cast<float*>(a.workspace)};
  dispatch_width<kPipelinedBackward>(s.embed_dim(), [&](auto index) {
    const auto kernel = alore_backward_pipelined_kernel<T, decltype(index)::value, kNorm>;
    static SharedMemoryGrants grants;
    grants.allow(reinterpret_cast<const void*>(kernel), plan.shared_bytes, "alore_backward");
    launch_overlapping(kernel, context, plan.blocks, 32 * plan.warps, plan.shared_bytes,
                       plan.overlaps_launches, "alore_backward", params);
  });
}

}  // namespace

void alore_backward_pipelined(const CudaContext& context, const AloreShape& s, const AloreBackwardPlan& plan,
                              const AloreBackwardArgs& a) {
  if (a.dropout.p > 0 || a.grad_sum != nullptr)
    throw std::runtime_error("alore_backward: the plan is of a call without dropout and residual");
  if (s.norm) return launch<__nv_bfloat16, true>(context, s, plan, a);
  if (s.output == DType::kBFloat16) return launch<__nv_bfloat16, false>(context, s, plan, a);
  launch<__half, false>(context, s, plan, a);
}

}  // namespace alore::kernels
