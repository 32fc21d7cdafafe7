#include "kernels/layer_norm.cuh"

namespace alore::kernels {
namespace {

template <typename Acc, typename Out>
__device__ __forceinline__ Acc total_grad(const Out* a, const Out* b, int64_t i) {
  const Acc g = convert<Acc>(a[i]);
  return b == nullptr ? g : g + convert<Acc>(b[i]);
}

// With g = grad * weight and n = (x - mean) * rstd:  dx = rstd * (g - mean(g) - n * mean(g * n)).
template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(LayerNormShape s, const Out* __restrict__ grad_a, const Out* __restrict__ grad_b,
                    const In* __restrict__ x, const void* weight, const acc_t<In>* __restrict__ mean,
                    const acc_t<In>* __restrict__ rstd, In* __restrict__ grad_x) {
  using Acc = acc_t<In>;
  const int64_t t = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / 32;
  if (t >= s.num_tokens) return;
  const int lane = threadIdx.x % 32;
  const int64_t d = s.embed_dim, row = t * d;
  const Acc m = mean[t], r = rstd[t];
  Acc sum_g = 0, sum_gn = 0;
  for (int64_t i = lane; i < d; i += 32) {
    const Acc g = affine<Acc>(total_grad<Acc>(grad_a, grad_b, row + i), weight, nullptr, s.affine, i);
    sum_g += g;
    sum_gn += g * ((convert<Acc>(x[row + i]) - m) * r);
  }
  const Acc mean_g = warp_sum(sum_g) / static_cast<Acc>(d), mean_gn = warp_sum(sum_gn) / static_cast<Acc>(d);
  for (int64_t i = lane; i < d; i += 32) {
    const Acc g = affine<Acc>(total_grad<Acc>(grad_a, grad_b, row + i), weight, nullptr, s.affine, i);
    const Acc n = (convert<Acc>(x[row + i]) - m) * r;
    grad_x[row + i] = convert<In>(r * (g - mean_g - n * mean_gn));
  }
}

// Stage one of the affine's gradients: a block sums its rows, a thread a column.
template <typename In, typename Out>
__global__ void affine_partial_kernel(LayerNormShape s, int64_t rows_per_block,
                                      const Out* __restrict__ grad_a, const Out* __restrict__ grad_b,
                                      const In* __restrict__ x, const acc_t<In>* __restrict__ mean,
                                      const acc_t<In>* __restrict__ rstd,
                                      acc_t<In>* __restrict__ partial) {  // [gridDim.y, 2, embed_dim]
  using Acc = acc_t<In>;
  const int64_t d = s.embed_dim, i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= d) return;
  const int64_t begin = blockIdx.y * rows_per_block, end = min(s.num_tokens, begin + rows_per_block);
  Acc weight_sum = 0, bias_sum = 0;
  for (int64_t t = begin; t < end; ++t) {
    const Acc g = total_grad<Acc>(grad_a, grad_b, t * d + i);
    bias_sum += g;
    weight_sum += g * ((convert<Acc>(x[t * d + i]) - mean[t]) * rstd[t]);
  }
  partial[int64_t{blockIdx.y} * 2 * d + i] = weight_sum;
  partial[(int64_t{blockIdx.y} * 2 + 1) * d + i] = bias_sum;
}

template <typename Acc, typename Affine>
__global__ void affine_final_kernel(int64_t d, int64_t blocks, const Acc* __restrict__ partial,
                                    Affine* grad_weight, Affine* grad_bias) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= 2 * d) return;
  Acc sum = 0;
  for (int64_t b = 0; b < blocks; ++b) sum += partial[b * 2 * d + i];
  Affine* out = i < d ? grad_weight : grad_bias;
  if (out != nullptr) out[i < d ? i : i - d] = convert<Affine>(sum);
}

}  // namespace

void layer_norm_backward(const CudaContext& context, const LayerNormShape& s, const void* grad_a,
                         const void* grad_b, const void* x, const void* weight, const void* mean,
                         const void* rstd, void* grad_x) {
  if (s.num_tokens == 0) return;
  dispatch_norm(s, [&](auto in_tag, auto out_tag) {
    using In = typename decltype(in_tag)::type;
    using Out = typename decltype(out_tag)::type;
    backward_kernel<In, Out><<<row_blocks(s.num_tokens), kThreads, 0, context.stream>>>(
        s, static_cast<const Out*>(grad_a), static_cast<const Out*>(grad_b), static_cast<const In*>(x),
        weight, static_cast<const acc_t<In>*>(mean), static_cast<const acc_t<In>*>(rstd),
        static_cast<In*>(grad_x));
  });
  check_launch("layer_norm_backward");
}

void layer_norm_affine_backward(const CudaContext& context, const LayerNormShape& s, const void* grad_a,
                                const void* grad_b, const void* x, const void* mean, const void* rstd,
                                void* grad_weight, void* grad_bias, int64_t blocks, void* partial) {
  const int64_t rows_per_block = (s.num_tokens + blocks - 1) / blocks;
  const auto columns = static_cast<unsigned>((s.embed_dim + kThreads - 1) / kThreads);
  dispatch_norm(s, [&](auto in_tag, auto out_tag) {
    using In = typename decltype(in_tag)::type;
    using Out = typename decltype(out_tag)::type;
    affine_partial_kernel<In, Out>
        <<<dim3(columns, static_cast<unsigned>(blocks)), kThreads, 0, context.stream>>>(
            s, rows_per_block, static_cast<const Out*>(grad_a), static_cast<const Out*>(grad_b),
            static_cast<const In*>(x), static_cast<const acc_t<In>*>(mean),
            static_cast<const acc_t<In>*>(rstd), static_cast<acc_t<In>*>(partial));
  });
  check_launch("layer_norm_affine_partial");
  dispatch_acc(accumulate_type(s.input), [&](auto acc_tag) {
    dispatch(s.affine, [&](auto affine_tag) {
      using Acc = typename decltype(acc_tag)::type;
      using Affine = typename decltype(affine_tag)::type;
      affine_final_kernel<Acc, Affine><<<2 * columns, kThreads, 0, context.stream>>>(
          s.embed_dim, blocks, static_cast<const Acc*>(partial), static_cast<Affine*>(grad_weight),
          static_cast<Affine*>(grad_bias));
    });
  });
  check_launch("layer_norm_affine_final");
}

}  // namespace alore::kernels
