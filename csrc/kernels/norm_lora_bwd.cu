// The half of the backward that reads x: the gradient of a layer norm whose output is read by a base product
// and by A, and the gradient of A, in one pass over x and grad_normalised.
//
// As in alore_bwd_pipelined.cu the norm is folded in: with R = rstd * grad_code, rounded to 16 bits,
//   d(A) = grad_code^T n = weight * (R^T x - sum_t mean_t R_t) + bias * sum_t grad_code_t
//   d(x) = g - mean(g) - n' * mean(g * n'),    n' = (x - mean) * rstd,
//   g    = rstd * weight * (grad_normalised + grad_code A) = rstd * weight * grad_normalised + R D
// The means over a row need no g: A's part of them is a sum over the code, of R * sum(D) and R * (code - A
// bias).
#include "kernels/lora_finish.cuh"
#include "kernels/norm_lora.cuh"
#include "kernels/partial_sums.cuh"

namespace alore::kernels {
namespace {

template <typename T>
struct BackwardParams {
  int64_t num_tokens;
  const T *grad, *x;          // grad: grad_normalised, or x without grad_x
  const T *grad_code, *code;  // [num_tokens, 8]
  const float *mean, *rstd;
  AffineSource affine;
  CodeFactor factor;
  RankScale scale;
  T* grad_x;       // or null
  float* partial;  // [blocks, rank, dim]
};

template <typename T, PipelinedShape kShape>
class NormLoraBackward {
  static constexpr NormLoraBackwardLayout kL{kShape};
  static constexpr CodeImages kI = kL.images;
  static constexpr int kDim = kL.dim, kItems = kL.items, kRowTiles = kL.row_tiles;
  static constexpr int kRowBytes = kL.row_stride * 2, kCodeBytes = kCodeColumns * 2;

  const BackwardParams<T>& p;
  unsigned char* shared;
  const int lane, g, c, warp, row_tile, first_group;

  float factor_sum[kItems][2][4] = {};  // R^T x: 16 columns by 8 code columns each
  float mean_sum = 0.0f,
        code_sum = 0.0f;  // sum_t mean_t R_t and sum_t grad_code_t, code column threadIdx.x % 16

  template <typename U>
  __device__ U* at(int offset) const {
    return reinterpret_cast<U*>(shared + offset);
  }

 public:
  __device__ NormLoraBackward(const BackwardParams<T>& params, unsigned char* memory)
      : p(params),
        shared(memory),
        lane(threadIdx.x % 32),
        g(lane / 4),
        c(lane % 4),
        warp(threadIdx.x / 32),
        row_tile(warp / kL.per_row_tile),
        first_group(warp % kL.per_row_tile * kItems) {}

  __device__ __forceinline__ void run() {
    const int64_t count = (p.num_tokens + kL.rows - 1) / kL.rows;
    static_assert(CodeImages::scratch_bytes(kDim) <= kL.stage_bytes);
    run_stages<kL.stage_bytes>(*this, blockIdx.x, count, gridDim.x, kL.stages, [&](int scratch) {
      make_code_images<T, kDim, kL.threads>(
          shared, at<float>(scratch), p.factor, p.affine,
          // A masked row has no part in d(x), whatever it holds.
          [&](int w) { return p.scale.template at<T>(w) != 0.0f; },
          [&](int i, float v) { at<T>(kL.weight16)[by_lane(i)] = convert<T>(v); });
    });
    finish();
  }

  // The steps of run_stages.

  __device__ __forceinline__ void sync() const { __syncthreads(); }

  // Rows past the end arrive as zeros, mean and rstd included: they add nothing anywhere.
  __device__ __forceinline__ void load(int64_t tile, int64_t count, int stage) const {
    static_assert(kL.threads >= 4 * kL.rows);
    if (tile < count) {
      const int64_t first = tile * kL.rows;
      const T* const sources[2] = {p.x, p.grad};
      copy_rows_async<kDim, kL.rows, kL.threads>(shared + stage, kL.grad, threadIdx.x, sources, first,
                                                 p.num_tokens);
      const int i = threadIdx.x % kL.rows, what = threadIdx.x / kL.rows;
      const bool live = first + i < p.num_tokens;
      const int64_t token = live ? first + i : 0;
      if (what < 2) {
        copy_async_16(shared + stage + (what == 0 ? kL.grad_code : kL.code) + i * kCodeBytes,
                      (what == 0 ? p.grad_code : p.code) + token * kCodeColumns, live);
      } else if (what < 4) {
        copy_async_4(shared + stage + (what == 2 ? kL.mean : kL.rstd) + i * 4,
                     (what == 2 ? p.mean : p.rstd) + token, live);
      }
    }
    copy_async_commit();
  }

  // This warp's share of the sums over a row.
  __device__ __forceinline__ void codes(int stage) const {
    if (p.grad_x == nullptr) return;
    const uint32_t x_at = shared_address(shared) + stage + row_tile * kTileRows * kRowBytes +
                          operand_rows(lane, kRowBytes) + first_group * 64;
    WarpGradients<T> sums;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const uint4 weights = load_shared_16(at<T>(kL.weight16) + (first_group + k) * kGroupColumns + c * 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t x[4], grad[4];
        load_matrices(x, x_at + k * 64 + half * 32);
        load_matrices(grad, x_at + kL.grad + k * 64 + half * 32);
        sums.add(grad, x, weights, half);
      }
    }
    sums.leave(at<float2>(kL.row_sums) + warp * kTileRows, g, c);
  }

  // R, and a row's terms of d(x), by 16 lanes a row: the first 8 have a code column each, and all of them the
  // warps' shares of the sums.
  __device__ __forceinline__ void mixing(int64_t, int stage) {
    const int w = threadIdx.x % kCodeTile;
    const bool is_code = w < kCodeColumns;
#pragma unroll
    for (int first = 0; first < kL.rows * kCodeTile; first += kL.threads) {
      const int row = (first + static_cast<int>(threadIdx.x)) / kCodeTile;
      if (kL.threads > kL.mixers && row >= kL.rows) break;
      const int tile = row / kTileRows, t = row % kTileRows;
      const float mean = at<float>(stage + kL.mean)[row], rstd = at<float>(stage + kL.rstd)[row];
      float of_weight = 0.0f, of_normalised = 0.0f;
      if (is_code) {
        const float grad = convert<float>(at<T>(stage + kL.grad_code)[row * kCodeColumns + w]);
        const T r = convert<T>(rstd * grad);
        at<T>(kL.scaled)[row * kCodeColumns + w] = r;
        const float rounded = convert<float>(r);
        mean_sum += mean * rounded;
        code_sum += grad;
        const float code = convert<float>(at<T>(stage + kL.code)[row * kCodeColumns + w]);
        of_weight = rounded * at<float>(kI.column_sum)[w];
        // The code of a masked row may be anything.
        of_normalised = rounded == 0.0f ? 0.0f : rounded * (code - at<float>(kI.column_bias)[w]);
      }
      if (p.grad_x == nullptr) continue;
      leave_gradient_terms<kL.per_row_tile, kDim>(at<float4>(kL.row_terms) + row, at<float2>(kL.row_sums),
                                                  tile, t, w, mean, rstd, of_weight, of_normalised);
    }
  }

  // R^T x of this warp's columns, and d(x), which leaves by way of grad's place in the stage.
  __device__ __forceinline__ void outputs(int64_t tile, int stage) {
    unsigned char* const rows = shared + stage + row_tile * kTileRows * kRowBytes;
    const uint32_t at_group = shared_address(rows) + first_group * 64;
    const uint32_t factor_at =
        shared_address(shared + kI.factor) + factor_lane(lane, kI.factor_stride * 2) + first_group * 64;
    const unsigned char* scaled = shared + kL.scaled + row_tile * kTileRows * kCodeBytes;
    uint32_t turned[2];
    load_matrices_transposed(turned, shared_address(scaled) + lane % 16 * kCodeBytes);
    const uint32_t low = *reinterpret_cast<const uint32_t*>(scaled + g * kCodeBytes + c * 4);
    const uint32_t high = *reinterpret_cast<const uint32_t*>(scaled + (g + 8) * kCodeBytes + c * 4);
    const float4 terms0 = at<float4>(kL.row_terms)[row_tile * kTileRows + g];
    const float4 terms1 = at<float4>(kL.row_terms)[row_tile * kTileRows + g + 8];
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int column = (first_group + k) * kGroupColumns;
      uint32_t d[4];
      load_matrices_transposed(d, factor_at + k * 64);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t here = at_group + k * 64 + half * 32;
        uint32_t x[4], grad[4];
        load_matrices_transposed(x, here + operand_turned(lane, kRowBytes));
        mma<T>(factor_sum[k][half], x, turned[0], turned[1]);
        if (p.grad_x == nullptr) continue;

        load_matrices(x, here + operand_rows(lane, kRowBytes));
        load_matrices(grad, here + kL.grad + operand_rows(lane, kRowBytes));
        unsigned char* to = rows + kL.grad + g * kRowBytes + (column + half * 16 + 2 * c) * 2;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float2 weight =
              *reinterpret_cast<const float2*>(at<float>(kI.weight) + column + half * 16 + n * 8 + 2 * c);
          const float2 grad0 = unpack2<T>(grad[2 * n]), grad1 = unpack2<T>(grad[2 * n + 1]);
          const float2 x0 = unpack2<T>(x[2 * n]), x1 = unpack2<T>(x[2 * n + 1]);
          float out[4] = {grad0.x * weight.x * terms0.x + (x0.x * terms0.y + terms0.z),
                          grad0.y * weight.y * terms0.x + (x0.y * terms0.y + terms0.z),
                          grad1.x * weight.x * terms1.x + (x1.x * terms1.y + terms1.z),
                          grad1.y * weight.y * terms1.x + (x1.y * terms1.y + terms1.z)};
          mma8<T>(out, low, high, d[2 * half + n]);
          *reinterpret_cast<uint32_t*>(to + n * 16) = pack2<T>(out[0], out[1]);
          *reinterpret_cast<uint32_t*>(to + 8 * kRowBytes + n * 16) = pack2<T>(out[2], out[3]);
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
  // The block's part of d(A), added in a fixed order.
  __device__ __forceinline__ void finish() {
    allow_next_launch();
    float* const sums = at<float>(kL.sums);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float* to = sums + (row_tile * kCodeColumns + 2 * c) * kL.sum_stride +
                    (first_group + k) * kGroupColumns + half * 16 + g;
        const float (&sum)[4] = factor_sum[k][half];
        to[0] = sum[0], to[kL.sum_stride] = sum[1];
        to[8] = sum[2], to[kL.sum_stride + 8] = sum[3];
      }
    }
    float* const of_threads = at<float>(kL.thread_sums);
    if (threadIdx.x < kL.mixers) {
      of_threads[threadIdx.x] = mean_sum;
      of_threads[kL.mixers + threadIdx.x] = code_sum;
    }
    __syncthreads();
    float* const totals = at<float>(kL.totals);
    if (threadIdx.x < 2 * kCodeTile) {
      const float* column = of_threads + threadIdx.x / kCodeTile * kL.mixers + threadIdx.x % kCodeTile;
      float total = 0.0f;
#pragma unroll 8
      for (int i = 0; i < kL.mixers; i += kCodeTile) total += column[i];
      totals[threadIdx.x] = total;
    }
    __syncthreads();
    const int entries = p.factor.rank * kDim;
    float* const out = p.partial + static_cast<int64_t>(blockIdx.x) * entries;
    for (int i = threadIdx.x; i < entries; i += kL.threads) {
      const int w = i / kDim, column = i % kDim;
      float sum = 0.0f;
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile)
        sum += sums[(tile * kCodeColumns + w) * kL.sum_stride + column];
      out[i] = at<float>(kI.weight)[column] * (sum - totals[w]) +
               at<float>(kI.bias)[column] * totals[kCodeTile + w];
    }
  }
};

template <typename T, int kIndex>  // of kPipelinedBackward
__global__ void __launch_bounds__(PipelinedSizes(kPipelinedBackward[kIndex]).threads, 1)
    norm_lora_backward_kernel(const __grid_constant__ BackwardParams<T> p) {
  extern __shared__ __align__(128) unsigned char shared[];
  wait_for_launches_before();
  // Not compiled where no block may have that much shared memory: no plan chooses it there.
  if constexpr (NormLoraBackwardLayout(kPipelinedBackward[kIndex]).bytes <= kMostSharedBytes)
    NormLoraBackward<T, kPipelinedBackward[kIndex]>(p, shared).run();
}

// The first `blocks_a` blocks add up d(A), of which rows whose c is 0 are exactly 0 even where an activation
// was not finite; the others a unit of d(B) each, and the coefficients' gradients.
template <typename T, typename Factor>
__global__ void __launch_bounds__(kSumThreads)
    norm_lora_finish_kernel(const float* partial, int blocks, int blocks_a,
                            const __grid_constant__ FinishArgs args, const Factor* b, Factor* grad_a,
                            Factor* grad_b, Factor* grad_coeff) {
  wait_for_launches_before();
  if (static_cast<int>(blockIdx.x) >= blocks_a) {
    finish_unit<T, Factor, 1, kSumThreads / 32>(args, blockIdx.x - blocks_a, b, nullptr, grad_b, grad_coeff);
    return;
  }
  const int dim = static_cast<int>(args.in_features), entries = args.scale.rank * dim;
  const int i = blockIdx.x * kSumEntries + threadIdx.x;
  const float sum = sum_partials(partial, blocks, entries);
  if (threadIdx.x >= kSumEntries || i >= entries) return;
  grad_a[i] = convert<Factor>(args.scale.template at<T>(i / dim) == 0.0f ? 0.0f : sum);
}

}  // namespace

void norm_lora_output_backward(const CudaContext& context, const NormLoraShape& s, const NormLoraPlan& plan,
                               const NormLoraBackwardArgs& a) {
  if (!plan.fused) throw std::runtime_error("norm_lora_output_backward: the plan is not fused");
  lora_output_backward(context, s.linear, plan.linear, rank_scale(s.linear, a.coefficients), a.packed,
                       a.grad_out, a.code, a.grad_code, plan.overlaps_launches, a.workspace);
}

void norm_lora_backward(const CudaContext& context, const NormLoraShape& s, const NormLoraPlan& plan,
                        const NormLoraBackwardArgs& a) {
  if (!plan.fused) throw std::runtime_error("norm_lora_backward: the plan is not fused");
  using T = __nv_bfloat16;
  const LoraShape& linear = s.linear;
  auto* const partial =
      reinterpret_cast<float*>(static_cast<unsigned char*>(a.workspace) + plan.linear.workspace_bytes);
  const BackwardParams<T> params{linear.num_tokens,
                                 static_cast<const T*>(a.grad_x == nullptr ? a.x : a.grad_normalised),
                                 static_cast<const T*>(a.x),
                                 static_cast<const T*>(a.grad_code),
                                 static_cast<const T*>(a.code),
                                 a.mean,
                                 a.rstd,
                                 {a.norm.weight, a.norm.bias, s.affine},
                                 {a.factors.a, linear.factor, static_cast<int>(linear.rank)},
                                 rank_scale(linear, a.coefficients),
                                 static_cast<T*>(a.grad_x),
                                 partial};
  dispatch_width<kPipelinedBackward>(linear.in_features, [&](auto index) {
    const auto kernel = norm_lora_backward_kernel<T, decltype(index)::value>;
    static SharedMemoryGrants grants;
    grants.allow(reinterpret_cast<const void*>(kernel), plan.backward_shared_bytes, "norm_lora_backward");
    launch_overlapping(kernel, context, plan.backward_blocks,
                       PipelinedSizes(kPipelinedBackward[decltype(index)::value]).threads,
                       plan.backward_shared_bytes, plan.overlaps_launches, "norm_lora_backward", params);
  });
  const FinishArgs finish(linear, plan.linear, rank_scale(linear, a.coefficients), false, a.workspace);
  const int blocks_a = sum_blocks(linear.rank * linear.in_features);
  const auto launch = [&](auto tag) {
    using Factor = typename decltype(tag)::type;
    launch_overlapping(norm_lora_finish_kernel<T, Factor>, context, blocks_a + finish.units(), kSumThreads, 0,
                       plan.overlaps_launches, "norm_lora_finish", static_cast<const float*>(partial),
                       plan.backward_blocks, blocks_a, finish, static_cast<const Factor*>(a.factors.b),
                       static_cast<Factor*>(a.gradients.a), static_cast<Factor*>(a.gradients.b),
                       static_cast<Factor*>(a.gradients.coeff));
  };
  linear.factor == DType::kFloat32 ? launch(Tag<float>{}) : launch(Tag<T>{});
}

}  // namespace alore::kernels
