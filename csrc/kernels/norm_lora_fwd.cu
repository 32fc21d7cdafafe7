// n = layer_norm(x) and its code n A^T, beside each other as the base product's operand, in one pass over x;
// and the product's other operand [W | B c], with this step's mask.
//
// A team of warps has three tiles of 16 * row_tiles tokens in shared memory (run_stages). Statistics and
// codes are products of x as it was read; n is made on the way out, 16 bytes a lane.
#include "kernels/lora_pack.cuh"
#include "kernels/norm_lora.cuh"

namespace alore::kernels {
namespace {

template <typename T, typename Factor>
struct ForwardParams {
  int64_t num_tokens;
  const T* x;
  AffineSource affine;
  float eps;
  CodeFactor factor;
  T *extended, *code;
  float *mean, *rstd;
  PackArgs<Factor> pack;
  CoefficientArgs<Factor> coefficients;
  int pack_vectors;
};

template <typename T, typename Factor, PipelinedShape kShape>
class NormLoraForward {
  static constexpr NormLoraForwardLayout kL{kShape};
  static constexpr CodeImages kI = kL.images;
  static constexpr int kDim = kL.dim, kItems = kL.items, kRowBytes = kL.row_stride * 2;
  static constexpr int kCodeSize = kTileRows * kCodeColumns, kExtended = kDim + kCodeColumns;

  const ForwardParams<T, Factor>& p;
  unsigned char* shared;
  const float* const c_of;  // [8]: the coefficients under this step's mask
  const int thread, team;   // of the team; of the block
  unsigned char* own;       // the team's part of the memory
  const int lane, warp, row_tile, first_group;

  template <typename U>
  __device__ U* at(int offset) const {
    return reinterpret_cast<U*>(own + offset);
  }
  template <typename U>
  __device__ U* image(int offset) const {
    return reinterpret_cast<U*>(shared + offset);
  }

 public:
  // `c` is [8] of shared memory.
  __device__ NormLoraForward(const ForwardParams<T, Factor>& params, unsigned char* memory, float* c)
      : p(params),
        shared(memory),
        c_of(c),
        thread(threadIdx.x % kL.threads),
        team(threadIdx.x / kL.threads),
        own(memory + kL.first_team + team * kL.team_bytes),
        lane(thread % 32),
        warp(thread / 32),
        row_tile(warp / kL.per_row_tile),
        first_group(warp % kL.per_row_tile * kItems) {}

  __device__ __forceinline__ void run() {
    if (blockIdx.x == 0) p.coefficients.write_mask();
    const int64_t count = (p.num_tokens + kL.rows - 1) / kL.rows, step = int64_t{gridDim.x} * kL.teams;
    static_assert(CodeImages::scratch_bytes(kDim) <= kL.stage_bytes);
    run_stages<kL.stage_bytes>(
        *this, int64_t{blockIdx.x} * kL.teams + team, count, step, kL.stages, [&](int) {
          // The first team's third stage: all teams make the images together.
          auto* scratch = image<float>(kL.first_team + kL.stages + 2 * kL.stage_bytes);
          make_code_images<T, kDim, kL.threads * kL.teams>(
              shared, scratch, p.factor, p.affine, [](int) { return true; }, [](int, float) {});
          const int threads = gridDim.x * blockDim.x;
#pragma unroll 3
          for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < p.pack_vectors; i += threads)
            pack_vector<T, Factor, 1, int>(p.pack, c_of, i);
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

  // This warp's share of x D^T, and its columns' moments.
  __device__ __forceinline__ void codes(int stage) const {
    const int g = lane / 4, c = lane % 4;
    const unsigned char* rows = own + stage + row_tile * kTileRows * kRowBytes + first_group * 64;
    const uint32_t x_at = shared_address(rows) + operand_rows(lane, kRowBytes);
    const uint32_t factor_at =
        shared_address(shared + kI.factor) + factor_lane(lane, kI.factor_stride * 2) + first_group * 64;
    float z[4] = {};
    WarpMoments<T, kL.columns, kRowBytes> moments;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      uint32_t d[4];
      load_matrices(d, factor_at + k * 64);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t x[4];
        load_matrices(x, x_at + k * 64 + half * 32);
        mma<T>(z, x, d[2 * half], d[2 * half + 1]);
        moments.add(x);
      }
    }
    float* to = at<float>(kL.code) + warp * kCodeSize + g * kCodeColumns + 2 * c;
    *reinterpret_cast<float2*>(to) = {z[0], z[1]};
    *reinterpret_cast<float2*>(to + 8 * kCodeColumns) = {z[2], z[3]};
    moments.leave(rows, at<float2>(kL.row_sums) + warp * kTileRows, g, c);
  }

  // The statistics of a row by 16 lanes, of which the first 8 have a code column each.
  __device__ __forceinline__ void mixing(int64_t tile, int) const {
    const int w = thread % kCodeTile;
#pragma unroll
    for (int first = 0; first < kL.rows * kCodeTile; first += kL.threads) {
      const int row = (first + thread) / kCodeTile;
      if (kL.threads > kL.mixers && row >= kL.rows) break;
      const int tile_row = row / kTileRows, t = row % kTileRows;
      const RowStatistics of_row = row_statistics<kL.per_row_tile, kL.columns>(
          at<float2>(kL.row_sums) + tile_row * kL.per_row_tile * kTileRows, t, w, p.eps);
      const int64_t token = tile * kL.rows + row;
      const bool live = token < p.num_tokens;
      if (w == 0) {
        at<float2>(kL.row_terms)[row] = {of_row.scaling, -of_row.mean * of_row.scaling};
        if (live) {
          p.mean[token] = of_row.mean;
          p.rstd[token] = of_row.rstd;
        }
      }
      if (w >= kCodeColumns || !live) continue;
      float z = 0.0f;
      const float* shares =
          at<float>(kL.code) + tile_row * kL.per_row_tile * kCodeSize + t * kCodeColumns + w;
#pragma unroll
      for (int i = 0; i < kL.per_row_tile; ++i) z += shares[i * kCodeSize];
      z = of_row.scaling * (z - of_row.mean * image<float>(kI.column_sum)[w]) +
          image<float>(kI.column_bias)[w];
      // Padding stays 0 even where x is not finite.
      const T value = convert<T>(w < p.factor.rank ? z : 0.0f);
      p.code[token * kCodeColumns + w] = value;
      // c itself is inside [W | B c]; a masked column must not pass on what is not finite.
      p.extended[token * kExtended + kDim + w] = c_of[w] == 0.0f ? convert<T>(0.0f) : value;
    }
  }

  // n of this warp's columns, 8 a lane.
  __device__ __forceinline__ void outputs(int64_t tile, int stage) const {
    constexpr int kPieces = kItems * 4, kStep = 32 / kPieces;
    const int row = lane / kPieces, column = first_group * kGroupColumns + lane % kPieces * 8;
    const Eight weight = shared8(image<float>(kI.weight) + column);
    const Eight bias = shared8(image<float>(kI.bias) + column);
    const unsigned char* from = own + stage + (row_tile * kTileRows + row) * kRowBytes + column * 2;
    const float2* terms = at<float2>(kL.row_terms) + row_tile * kTileRows + row;
    const int64_t first = tile * kL.rows + row_tile * kTileRows + row;
    T* to = p.extended + first * kExtended + column;
#pragma unroll
    for (int i = 0; i < kTileRows; i += kStep) {
      const float2 of_row = terms[i];
      const Eight x = unpack8<T>(load_shared_16(from + i * kRowBytes));
      float n[8];
#pragma unroll
      for (int e = 0; e < 8; ++e) n[e] = (x.v[e] * of_row.x + of_row.y) * weight.v[e] + bias.v[e];
      if (first + i < p.num_tokens)
        store_16(to + i * kExtended,
                 {pack2<T>(n[0], n[1]), pack2<T>(n[2], n[3]), pack2<T>(n[4], n[5]), pack2<T>(n[6], n[7])});
    }
  }
};

template <typename T, typename Factor, int kIndex>  // of kPipelinedForward
__global__ void __launch_bounds__(
    PipelinedSizes(kPipelinedForward[kIndex]).threads* kPipelinedForward[kIndex].teams, 1)
    norm_lora_forward_kernel(const __grid_constant__ ForwardParams<T, Factor> p) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ float c[kCodeColumns];
  wait_for_launches_before();
  if (threadIdx.x < kCodeColumns) c[threadIdx.x] = p.coefficients.of(threadIdx.x);
  // Not compiled where no block may have that much shared memory: no plan chooses it there.
  if constexpr (NormLoraForwardLayout(kPipelinedForward[kIndex]).bytes <= kMostSharedBytes)
    NormLoraForward<T, Factor, kPipelinedForward[kIndex]>(p, shared, c).run();
}

}  // namespace

void norm_lora_forward(const CudaContext& context, const NormLoraShape& s, const NormLoraPlan& plan,
                       const NormLoraForwardArgs& a) {
  if (!plan.fused) throw std::runtime_error("norm_lora_forward: the plan is not fused");
  if (s.linear.num_tokens == 0) return;
  using T = __nv_bfloat16;
  const LoraShape& linear = s.linear;
  const auto launch = [&](auto tag) {
    using Factor = typename decltype(tag)::type;
    const ForwardParams<T, Factor> params{
        linear.num_tokens,
        static_cast<const T*>(a.x),
        {a.norm.weight, a.norm.bias, s.affine},
        a.norm.eps,
        {a.factors.a, linear.factor, static_cast<int>(linear.rank)},
        static_cast<T*>(a.extended),
        static_cast<T*>(a.code),
        a.mean,
        a.rstd,
        PackArgs<Factor>(linear, a.factors, a.packed, a.weight, a.extended_weight),
        CoefficientArgs<Factor>(linear, a.coefficients),
        static_cast<int>(pack_vectors(linear, true))};
    dispatch_width<kPipelinedForward>(linear.in_features, [&](auto index) {
      constexpr PipelinedShape kShape = kPipelinedForward[decltype(index)::value];
      const auto kernel = norm_lora_forward_kernel<T, Factor, decltype(index)::value>;
      static SharedMemoryGrants grants;
      grants.allow(reinterpret_cast<const void*>(kernel), plan.forward_shared_bytes, "norm_lora_forward");
      launch_overlapping(kernel, context, plan.forward_blocks, PipelinedSizes(kShape).threads * kShape.teams,
                         plan.forward_shared_bytes, plan.overlaps_launches, "norm_lora_forward", params);
    });
  };
  linear.factor == DType::kFloat32 ? launch(Tag<float>{}) : launch(Tag<T>{});
}

}  // namespace alore::kernels
