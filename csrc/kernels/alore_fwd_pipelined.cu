// Forward of the fused ALoRE adapter for the shapes that backbones are trained with (kPipelinedForward): the
// results of alore_fwd.cu by fewer instructions, the norm folded into the products (alore_pipelined.cuh).
//
// A team of warps has three tiles in shared memory: one whose results are written (`outputs`), the next,
// whose codes and statistics are made in the same phase (`codes`), and one on its way. A barrier of the team,
// mixing over blocks, a barrier. Teams share the factors and drift apart: while one mixes, another keeps
// memory busy.
#include "kernels/alore_fused.cuh"
#include "kernels/alore_pipelined.cuh"
#include "kernels/alore_rows.cuh"

namespace alore::kernels {
namespace {

template <typename T>
struct PipelinedParams {
  int64_t num_tokens;
  FactorSource factors;
  bool add_base;  // always behind a norm
  const T* x;
  AffineSource affine;
  float eps;
  T* out;
  float *mean, *rstd;
};

template <typename T, PipelinedShape kShape, bool kNorm>
class PipelinedForward {
  static constexpr PipelinedForwardLayout kL{kShape, kNorm};
  static constexpr FactorImages kI = kL.images;
  static constexpr int kBlocks = kPipelinedBlocks, kDim = kL.dim, kBlockDim = kL.block_dim;
  static constexpr int kItems = kL.items, kCodeStride = FactorImages::kCodeStride;
  static constexpr int kRowBytes = kL.row_stride * 2, kCodeSize = kTileRows * kCodeTile;

  const PipelinedParams<T>& p;
  unsigned char* shared;
  const int thread, team;  // of the team; of the block
  unsigned char* own;      // the team's part of the memory
  const int lane, g, c, warp, row_tile, block, first_group;
  const uint32_t rows_lane, down_columns, up_rows;  // this lane's part of ldmatrix addresses

  template <typename U>
  __device__ U* at(int offset) const {
    return reinterpret_cast<U*>(own + offset);
  }
  template <typename U>
  __device__ U* image(int offset) const {
    return reinterpret_cast<U*>(shared + offset);
  }

 public:
  __device__ PipelinedForward(const PipelinedParams<T>& params, unsigned char* memory)
      : p(params),
        shared(memory),
        thread(threadIdx.x % kL.threads),
        team(threadIdx.x / kL.threads),
        own(memory + kL.first_team + team * kL.team_bytes),
        lane(thread % 32),
        g(lane / 4),
        c(lane % 4),
        warp(thread / 32),
        row_tile(warp / kL.per_row_tile),
        block(warp % kL.per_row_tile / kL.splits),
        first_group(warp % kL.per_row_tile * kItems),
        rows_lane(operand_rows(lane, kRowBytes)),
        down_columns(shared_address(memory + kI.down) + operand_columns(lane, kI.down_stride * 2)),
        up_rows(shared_address(memory + kI.up) + operand_rows(lane, kI.up_stride * 2)) {}

  __device__ __forceinline__ void run() {
    const int64_t count = (p.num_tokens + kL.rows - 1) / kL.rows, step = int64_t{gridDim.x} * kL.teams;
    const int64_t tile = int64_t{blockIdx.x} * kL.teams + team;
    static_assert(FactorImages::scratch_bytes(kDim) <= kL.stage_bytes);
    run_stages<kL.stage_bytes>(*this, tile, count, step, kL.stages, [&](int) {
      // The first team's third stage: all teams make the images together.
      auto* scratch = image<float>(kL.first_team + kL.stages + 2 * kL.stage_bytes);
      make_images<T, kDim, kL.threads * kL.teams, kNorm>(shared, scratch, p.factors, p.affine,
                                                         [&](int i, float v, bool is_bias) {
                                                           if (is_bias) image<float>(kL.bias)[by_lane(i)] = v;
                                                         });
    });
  }

  // The steps of run_stages.

  __device__ __forceinline__ void sync() const {
    asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(kL.threads) : "memory");
  }

  // Rows past the end arrive as zeros, and are not written.
  __device__ __forceinline__ void load(int64_t tile, int64_t count, int stage) const {
    if (tile < count) {
      const T* const sources[1] = {p.x};
      copy_rows_async<kDim, kL.rows, kL.threads>(own + stage, 0, thread, sources, tile * kL.rows,
                                                 p.num_tokens);
    }
    copy_async_commit();
  }

  // This warp's share of x @ D, and its columns' mean and squares around it: sums by products with ones and
  // of rows with themselves.
  __device__ __forceinline__ void codes(int stage) const {
    const unsigned char* rows = own + stage + row_tile * kTileRows * kRowBytes + first_group * 64;
    const uint32_t x_at = shared_address(rows) + rows_lane;
    float z[2][4] = {};
    WarpMoments<T, kL.columns, kRowBytes> moments;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int column = (first_group + k) * kGroupColumns, local = column - block * kBlockDim;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t x[4], b[4];
        load_matrices(x, x_at + k * 64 + half * 32);
        load_matrices(b, down_columns + (kNorm ? column : local) * 2 + half * 32);
        mma<T>(z[0], x, b[0], b[1]);
        mma<T>(z[1], x, b[2], b[3]);
        if constexpr (kNorm) moments.add(x);
      }
    }
    store_code(at<float>(kL.code) + warp * kCodeSize, z, g, c);
    if constexpr (kNorm) moments.leave(rows, at<float2>(kL.row_sums) + warp * kTileRows, g, c);
  }

  // H of a code column of a row, a thread each; the norm's statistics of the row.
  __device__ __forceinline__ void mixing(int64_t tile, int) const {
    const int w = thread % kCodeTile;
#pragma unroll
    for (int first = 0; first < kL.rows * kCodeTile; first += kL.threads) {
      const int row = (first + thread) / kCodeTile;
      if (kL.threads > kL.mixers && row >= kL.rows) break;
      const int tile_row = row / kTileRows, t = row % kTileRows;
      RowStatistics of_row{0.0f, 1.0f, 1.0f};
      if constexpr (kNorm) {
        of_row = row_statistics<kL.per_row_tile, kL.columns>(
            at<float2>(kL.row_sums) + tile_row * kL.per_row_tile * kTileRows, t, w, p.eps);
        if (w == 0) {
          at<float2>(kL.row_terms)[row] = {of_row.scaling, -of_row.mean * of_row.scaling};
          const int64_t token = tile * kL.rows + row;
          if (token < p.num_tokens) {
            p.mean[token] = of_row.mean;
            p.rstd[token] = of_row.rstd;
          }
        }
      }
      Four z{}, h{};
      const int from = tile_row * kL.per_row_tile * kCodeSize + t * kCodeTile + code_column(t, w);
#pragma unroll
      for (int a = 0; a < kBlocks; ++a) {
#pragma unroll
        for (int s = 0; s < kL.splits; ++s)
          z.v[a] += at<float>(kL.code)[from + (a * kL.splits + s) * kCodeSize];
      }
      if constexpr (kNorm) {
        const Four column_sum = shared4(image<float>(kI.down_mean) + w * kBlocks);
        const Four column_bias = shared4(image<float>(kI.down_bias) + w * kBlocks);
#pragma unroll
        for (int a = 0; a < kBlocks; ++a)
          z.v[a] = of_row.scaling * (z.v[a] - of_row.mean * column_sum.v[a]) + column_bias.v[a];
      }
#pragma unroll
      for (int a = 0; a < kBlocks; ++a) {
        const Four s = shared4(image<float>(kI.mixing) + w * FactorImages::kMixingStride + a * kBlocks);
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) h.v[b] += s.v[b] * z.v[a];
      }
      const int to = (tile_row * kBlocks * kTileRows + t) * kCodeStride + w;
#pragma unroll
      for (int a = 0; a < kBlocks; ++a)
        at<T>(kL.mixed)[to + a * kTileRows * kCodeStride] = convert<T>(h.v[a]);
    }
  }

  // base + H @ up of this warp's columns, by way of x's place in the stage.
  __device__ __forceinline__ void outputs(int64_t tile, int stage) const {
    unsigned char* const rows = own + stage + row_tile * kTileRows * kRowBytes;
    const uint32_t x_at = shared_address(rows) + rows_lane + first_group * 64;
    uint32_t h[4];
    load_a(h, at<T>(kL.mixed) + (row_tile * kBlocks + block) * kTileRows * kCodeStride, kCodeStride, lane);
    float2 terms0{}, terms1{};
    if constexpr (kNorm) {
      terms0 = at<float2>(kL.row_terms)[row_tile * kTileRows + g];
      terms1 = at<float2>(kL.row_terms)[row_tile * kTileRows + g + 8];
    }
    const float base_share = p.add_base ? 1.0f : 0.0f;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int column = (first_group + k) * kGroupColumns;
      Eight weight, bias;
      if constexpr (kNorm) {
        weight = shared8(image<float>(kI.weight) + column + c * 8);
        bias = shared8(image<float>(kL.bias) + column + c * 8);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t x[4], b[4];
        load_matrices(x, x_at + k * 64 + half * 32);
        load_matrices_transposed(b, up_rows + (column - block * kBlockDim) * 2 + half * 32);
        T* to = reinterpret_cast<T*>(rows) + g * kL.row_stride + column + half * 16 + 2 * c;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float2 x0 = unpack2<T>(x[2 * n]), x1 = unpack2<T>(x[2 * n + 1]);
          float out[4];
          if constexpr (kNorm) {
            const int at = (2 * half + n) * 2;
            out[0] = (x0.x * terms0.x + terms0.y) * weight.v[at] + bias.v[at];
            out[1] = (x0.y * terms0.x + terms0.y) * weight.v[at + 1] + bias.v[at + 1];
            out[2] = (x1.x * terms1.x + terms1.y) * weight.v[at] + bias.v[at];
            out[3] = (x1.y * terms1.x + terms1.y) * weight.v[at + 1] + bias.v[at + 1];
          } else {
            out[0] = x0.x * base_share, out[1] = x0.y * base_share;
            out[2] = x1.x * base_share, out[3] = x1.y * base_share;
          }
          mma<T>(out, h, b[2 * n], b[2 * n + 1]);
          *reinterpret_cast<uint32_t*>(to + n * 8) = pack2<T>(out[0], out[1]);
          *reinterpret_cast<uint32_t*>(to + 8 * kL.row_stride + n * 8) = pack2<T>(out[2], out[3]);
        }
      }
    }
    __syncwarp();
    const int64_t first = tile * kL.rows + row_tile * kTileRows;
    store_rows<kDim, kItems>(rows + first_group * 64, p.out + first * kDim + first_group * kGroupColumns,
                             lane, p.num_tokens - first);
  }
};

template <typename T, int kIndex, bool kNorm>  // of kPipelinedForward
__global__ void __launch_bounds__(
    PipelinedSizes(kPipelinedForward[kIndex]).threads* kPipelinedForward[kIndex].teams, 1)
    alore_forward_pipelined_kernel(const __grid_constant__ PipelinedParams<T> p) {
  extern __shared__ __align__(128) unsigned char shared[];
  wait_for_launches_before();
  // Not compiled where no block may have that much shared memory: no plan chooses it there.
  if constexpr (PipelinedForwardLayout(kPipelinedForward[kIndex], kNorm).bytes <= kMostSharedBytes)
    PipelinedForward<T, kPipelinedForward[kIndex], kNorm>(p, shared).run();
}

template <typename T, bool kNorm>
void launch(const CudaContext& context, const AloreShape& s, const AloreForwardPlan& plan,
            const PipelinedParams<T>& params) {
  dispatch_width<kPipelinedForward>(s.embed_dim(), [&](auto index) {
    constexpr PipelinedShape kShape = kPipelinedForward[decltype(index)::value];
    const auto kernel = alore_forward_pipelined_kernel<T, decltype(index)::value, kNorm>;
    static SharedMemoryGrants grants;
    grants.allow(reinterpret_cast<const void*>(kernel), plan.shared_bytes, "alore_forward");
    constexpr int kThreads = PipelinedSizes(kShape).threads * kShape.teams;
    launch_overlapping(kernel, context, plan.blocks, kThreads, plan.shared_bytes, plan.overlaps_launches,
                       "alore_forward", params);
  });
}

template <typename T>
void launch(const CudaContext& context, const AloreShape& s, const AloreForwardPlan& plan,
            const AloreForwardArgs& a) {
  const PipelinedParams<T> params{s.num_tokens,
                                  factors_of(s, a.adapter),
                                  s.add_base,
                                  static_cast<const T*>(a.x),
                                  {a.norm.weight, a.norm.bias, s.affine},
                                  a.norm.eps,
                                  static_cast<T*>(a.out),
                                  a.mean,
                                  a.rstd};
  s.norm ? launch<T, true>(context, s, plan, params) : launch<T, false>(context, s, plan, params);
}

}  // namespace

void alore_forward_pipelined(const CudaContext& context, const AloreShape& s, const AloreForwardPlan& plan,
                             const AloreForwardArgs& a) {
  if (a.dropout.p > 0 || a.residual != nullptr)
    throw std::runtime_error("alore_forward: the plan is of a call without dropout and residual");
  s.output == DType::kBFloat16 ? launch<__nv_bfloat16>(context, s, plan, a)
                               : launch<__half>(context, s, plan, a);
}

}  // namespace alore::kernels
