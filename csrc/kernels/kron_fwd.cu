#include "kernels/cuda_common.cuh"
#include "kernels/gemm.h"
#include "kernels/kron.h"
#include "kernels/kron_mix.cuh"

namespace alore::kernels {

void kron_forward(const CudaContext& context, const KronShape& s, const KronPlan& plan,
                  const KronFactors& factors, const void* x, float beta, void* out, void* workspace) {
  if (s.num_tokens == 0) return;
  auto* base = static_cast<char*>(workspace);
  void *scale = base + plan.scale, *down = base + plan.down, *up = base + plan.up;
  void *code = base + plan.code, *mixed = base + plan.mixed;
  kron_pack_factors(context, s, factors, scale, down, up);

  const DType acc = accumulate_type(s.activation);
  const size_t element = size_of(s.activation);
  for (int64_t begin = 0; begin < s.num_tokens; begin += plan.chunk_tokens) {
    const int64_t tokens = std::min(plan.chunk_tokens, s.num_tokens - begin);
    const char* x_chunk = static_cast<const char*>(x) + begin * s.s_in * s.p_in * element;
    char* out_chunk = static_cast<char*>(out) + begin * s.s_out * s.p_out * element;
    gemm(context, Op::kNone, Op::kNone, tokens * s.s_in, s.width(), s.p_in, s.activation, x_chunk, s.p_in,
         down, s.width(), 0.0f, acc, code, s.width());
    kron_mix(context, s, tokens, scale, code, mixed);
    gemm(context, Op::kNone, Op::kNone, tokens * s.s_out, s.p_out, s.width(), s.activation, mixed, s.width(),
         up, s.p_out, beta, s.activation, out_chunk, s.p_out);
  }
}

}  // namespace alore::kernels
