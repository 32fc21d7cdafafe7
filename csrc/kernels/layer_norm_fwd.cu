#include "kernels/layer_norm.cuh"

namespace alore::kernels {
namespace {

template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads)
    layer_norm_kernel(LayerNormShape s, const In* __restrict__ x, const void* weight, const void* bias,
                      double eps, Out* __restrict__ out, acc_t<In>* __restrict__ mean,
                      acc_t<In>* __restrict__ rstd, bool statistics_known) {
  using Acc = acc_t<In>;
  const int64_t t = int64_t{blockIdx.x} * kRowsPerBlock + threadIdx.x / 32;
  if (t >= s.num_tokens) return;
  const int lane = threadIdx.x % 32;
  const int64_t d = s.embed_dim;
  x += t * d;
  out += t * d;
  Acc m, r;
  if (statistics_known) {
    m = mean[t];
    r = rstd[t];
  } else {
    Acc sum = 0;
    for (int64_t i = lane; i < d; i += 32) sum += convert<Acc>(x[i]);
    m = warp_sum(sum) / static_cast<Acc>(d);
    // Centred second pass: the one-pass formula loses all digits where the mean is large beside the spread.
    Acc squares = 0;
    for (int64_t i = lane; i < d; i += 32) {
      const Acc c = convert<Acc>(x[i]) - m;
      squares += c * c;
    }
    r = Acc(1) / sqrt(warp_sum(squares) / static_cast<Acc>(d) + static_cast<Acc>(eps));
    if (lane == 0) {
      mean[t] = m;
      rstd[t] = r;
    }
  }
  for (int64_t i = lane; i < d; i += 32) {
    out[i] = convert<Out>(affine<Acc>((convert<Acc>(x[i]) - m) * r, weight, bias, s.affine, i));
  }
}

void launch(const CudaContext& context, const LayerNormShape& s, const void* x, const void* weight,
            const void* bias, double eps, void* out, void* mean, void* rstd, bool statistics_known) {
  if (s.num_tokens == 0) return;
  dispatch_norm(s, [&](auto in_tag, auto out_tag) {
    using In = typename decltype(in_tag)::type;
    using Out = typename decltype(out_tag)::type;
    layer_norm_kernel<In, Out><<<row_blocks(s.num_tokens), kThreads, 0, context.stream>>>(
        s, static_cast<const In*>(x), weight, bias, eps, static_cast<Out*>(out),
        static_cast<acc_t<In>*>(mean), static_cast<acc_t<In>*>(rstd), statistics_known);
  });
  check_launch("layer_norm_forward");
}

}  // namespace

void layer_norm_forward(const CudaContext& context, const LayerNormShape& shape, const void* x,
                        const void* weight, const void* bias, double eps, void* out, void* mean, void* rstd) {
  launch(context, shape, x, weight, bias, eps, out, mean, rstd, false);
}

void layer_norm_recompute(const CudaContext& context, const LayerNormShape& shape, const void* x,
                          const void* weight, const void* bias, const void* mean, const void* rstd,
                          void* out) {
  launch(context, shape, x, weight, bias, 0.0, out, const_cast<void*>(mean), const_cast<void*>(rstd), true);
}

}  // namespace alore::kernels
