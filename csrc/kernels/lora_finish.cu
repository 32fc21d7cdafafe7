#include "kernels/lora_finish.cuh"

namespace alore::kernels {
namespace {

constexpr int kFinishWarps = 8;

template <typename T, typename Factor, int kTiles>
__global__ void __launch_bounds__(kFinishWarps * 32)
    lora_finish_kernel(FinishArgs args, const Factor* __restrict__ b, Factor* __restrict__ grad_a,
                       Factor* __restrict__ grad_b, Factor* __restrict__ grad_coeff) {
  finish_unit<T, Factor, kTiles, kFinishWarps>(args, blockIdx.x, b, grad_a, grad_b, grad_coeff);
}

}  // namespace

void lora_finish(const CudaContext& context, const LoraShape& s, const LoraPlan& plan, Factors2 factors,
                 const RankScale& scale, LoraGradients gradients, void* workspace) {
  const FinishArgs args(s, plan, scale, true, workspace);
  dispatch_fused(s, [&](auto tag, auto rank_tiles) {
    using T = typename decltype(tag)::type;
    constexpr int kTiles = decltype(rank_tiles)::value;
    const auto launch = [&](auto factor_tag) {
      using Factor = typename decltype(factor_tag)::type;
      lora_finish_kernel<T, Factor, kTiles><<<args.units(), kFinishWarps * 32, 0, context.stream>>>(
          args, static_cast<const Factor*>(factors.b), static_cast<Factor*>(gradients.a),
          static_cast<Factor*>(gradients.b), static_cast<Factor*>(gradients.coeff));
    };
    s.factor == DType::kFloat32 ? launch(Tag<float>{}) : launch(tag);
  });
  check_launch("lora_finish");
}

}  // namespace alore::kernels
