// The factors as products read them, with the coefficients and this step's mask inside: the mask is drawn by
// the kernel that first needs it, so that it costs no launch of its own.
#include "kernels/lora_pack.cuh"

namespace alore::kernels {
namespace {

constexpr int kThreadsPerBlock = 256;

// Calls f(Tag<T>, Tag<Factor>) for factors in the activations' dtype, or in float32 under 16-bit ones.
template <typename F>
void dispatch_pair(const LoraShape& s, F&& f) {
  dispatch(s.activation, [&](auto tag) {
    if (s.factor == s.activation) {
      f(tag, tag);
    } else if (is_16bit(s.activation) && s.factor == DType::kFloat32) {
      f(tag, Tag<float>{});
    } else {
      throw std::runtime_error("low-rank kernels: factors must have the activations' dtype or float32");
    }
  });
}

// One thread a uint4 of the packed factors, then of [weight | b c] where that is wanted.
template <typename T, typename Factor, int kTiles>
__global__ void __launch_bounds__(kThreadsPerBlock)
    pack_kernel(PackArgs<Factor> args, CoefficientArgs<Factor> coefficients) {
  __shared__ float c[8 * kTiles];
  if (threadIdx.x < 8 * kTiles) c[threadIdx.x] = coefficients.of(threadIdx.x);
  if (blockIdx.x == 0) coefficients.write_mask();
  __syncthreads();
  pack_vector<T, Factor, kTiles, int64_t>(args, c, blockIdx.x * int64_t{kThreadsPerBlock} + threadIdx.x);
}

// Row-major, for matrix products: a [width, in], b [out, width], effective [width].
template <typename T, typename Factor>
__global__ void __launch_bounds__(kThreadsPerBlock)
    pack_rows_kernel(int64_t in_features, int64_t out_features, int64_t width, const Factor* __restrict__ a,
                     const Factor* __restrict__ b, CoefficientArgs<Factor> coefficients, bool clear_a,
                     bool clear_b, T* __restrict__ out_a, T* __restrict__ out_b,
                     acc_t<T>* __restrict__ effective) {
  const int64_t rank = coefficients.rank, size_a = width * in_features, size_b = out_features * width;
  const int64_t start = blockIdx.x * int64_t{blockDim.x} + threadIdx.x,
                step = int64_t{gridDim.x} * blockDim.x;
  if (blockIdx.x == 0) coefficients.write_mask();
  for (int64_t i = start; i < width; i += step) effective[i] = coefficients.of(i);
  for (int64_t i = start; i < size_a; i += step) {
    const int64_t j = i / in_features;
    const bool zero = j >= rank || (clear_a && coefficients.of(j) == 0);
    out_a[i] = zero ? convert<T>(0.0f) : convert<T>(a[i]);
  }
  for (int64_t i = start; i < size_b; i += step) {
    const int64_t j = i % width;
    const bool zero = j >= rank || (clear_b && coefficients.of(j) == 0);
    out_b[i] = zero ? convert<T>(0.0f) : convert<T>(b[i / width * rank + j]);
  }
}

constexpr int kFoldRows = 8, kFoldRank = 64;

// A block folds 8 rows by 256 columns; a thread reads each entry of A once for all 8.
template <typename T, typename Factor>
__global__ void __launch_bounds__(kThreadsPerBlock)
    fold_kernel(int64_t in_features, int64_t out_features, const float* __restrict__ weight,
                const Factor* __restrict__ a, const Factor* __restrict__ b,
                CoefficientArgs<Factor> coefficients, T* __restrict__ folded) {
  __shared__ float scaled[kFoldRank][kFoldRows];  // c b^T of the block's rows
  __shared__ bool live[kFoldRank];
  const int64_t column = blockIdx.x * int64_t{kThreadsPerBlock} + threadIdx.x,
                first = blockIdx.y * int64_t{kFoldRows};
  const int64_t rank = coefficients.rank;
  if (blockIdx.x == 0 && blockIdx.y == 0) coefficients.write_mask();
  float sum[kFoldRows] = {};
  for (int64_t from = 0; from < rank; from += kFoldRank) {
    const int count = static_cast<int>(min(rank - from, int64_t{kFoldRank}));
    __syncthreads();
    for (int i = threadIdx.x; i < count * kFoldRows; i += kThreadsPerBlock) {
      const int j = i / kFoldRows, row = i % kFoldRows;
      const float c = coefficients.of(from + j);
      if (row == 0) live[j] = c != 0.0f;
      const bool read = c != 0.0f && first + row < out_features;
      scaled[j][row] = read ? c * convert<float>(b[(first + row) * rank + from + j]) : 0.0f;
    }
    __syncthreads();
    if (column >= in_features) continue;
    for (int j = 0; j < count; ++j) {
      if (!live[j]) continue;
      const float value = convert<float>(a[(from + j) * in_features + column]);
#pragma unroll
      for (int row = 0; row < kFoldRows; ++row) sum[row] = fmaf(scaled[j][row], value, sum[row]);
    }
  }
  if (column >= in_features) return;
#pragma unroll
  for (int row = 0; row < kFoldRows; ++row) {
    if (first + row >= out_features) break;
    const int64_t at = (first + row) * in_features + column;
    folded[at] = convert<T>(weight[at] + sum[row]);
  }
}

}  // namespace

void lora_pack(const CudaContext& context, const LoraShape& s, Factors2 factors,
               const Coefficients& coefficients, void* packed, const void* weight, void* extended) {
  const int64_t vectors = pack_vectors(s, extended != nullptr);
  const auto blocks = static_cast<unsigned>((vectors + kThreadsPerBlock - 1) / kThreadsPerBlock);
  dispatch_fused(s, [&](auto tag, auto rank_tiles) {
    using T = typename decltype(tag)::type;
    constexpr int kTiles = decltype(rank_tiles)::value;
    const auto launch = [&](auto factor_tag) {
      using Factor = typename decltype(factor_tag)::type;
      pack_kernel<T, Factor, kTiles><<<blocks, kThreadsPerBlock, 0, context.stream>>>(
          PackArgs<Factor>(s, factors, packed, weight, extended), CoefficientArgs<Factor>(s, coefficients));
    };
    s.factor == DType::kFloat32 ? launch(Tag<float>{}) : launch(tag);
  });
  check_launch("lora_pack");
}

void lora_pack_rows(const CudaContext& context, const LoraShape& s, Factors2 factors,
                    const Coefficients& coefficients, bool clear_a, bool clear_b, void* a, void* b,
                    void* effective) {
  const int64_t width = lora_code_width(s.activation, s.rank);
  dispatch_pair(s, [&](auto tag, auto factor_tag) {
    using T = typename decltype(tag)::type;
    using Factor = typename decltype(factor_tag)::type;
    const unsigned grid = grid_for(width * std::max(s.in_features, s.out_features));
    pack_rows_kernel<T, Factor><<<grid, kThreadsPerBlock, 0, context.stream>>>(
        s.in_features, s.out_features, width, static_cast<const Factor*>(factors.a),
        static_cast<const Factor*>(factors.b), CoefficientArgs<Factor>(s, coefficients), clear_a, clear_b,
        static_cast<T*>(a), static_cast<T*>(b), static_cast<acc_t<T>*>(effective));
  });
  check_launch("lora_pack_rows");
}

void lora_fold(const CudaContext& context, const LoraShape& s, Factors2 factors,
               const Coefficients& coefficients, const void* weight, void* folded) {
  const int64_t row_blocks = (s.out_features + kFoldRows - 1) / kFoldRows;
  constexpr int64_t kMaxGridY = 65535;
  if (row_blocks > kMaxGridY) throw std::runtime_error("lora_fold: more than 524,280 output features");
  const dim3 grid(static_cast<unsigned>((s.in_features + kThreadsPerBlock - 1) / kThreadsPerBlock),
                  static_cast<unsigned>(row_blocks));
  dispatch_pair(s, [&](auto tag, auto factor_tag) {
    using T = typename decltype(tag)::type;
    using Factor = typename decltype(factor_tag)::type;
    if constexpr (std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>) {
      fold_kernel<T, Factor><<<grid, kThreadsPerBlock, 0, context.stream>>>(
          s.in_features, s.out_features, static_cast<const float*>(weight),
          static_cast<const Factor*>(factors.a), static_cast<const Factor*>(factors.b),
          CoefficientArgs<Factor>(s, coefficients), static_cast<T*>(folded));
    } else {
      throw std::runtime_error("lora_fold: only for 16-bit activations");
    }
  });
  check_launch("lora_fold");
}

}  // namespace alore::kernels
