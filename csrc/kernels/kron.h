// Kronecker-structured linear maps, ALoRE eq. (6): W' = sum_e kron(scale[e], down[e] @ up[e]), never built.
//
// A token's row is cut into s_in blocks of p_in. With x[t,a,:] block a of token t,
//   code   Z[t,a,e,:] = x[t,a,:] @ down[e]                      [num_tokens, s_in,  num_experts * rank]
//   mixed  H[t,b,e,:] = sum_a scale[e,a,b] * Z[t,a,e,:]         [num_tokens, s_out, num_experts * rank]
//   out    y[t,b,:]   = sum_e H[t,b,e,:] @ up[e]                [num_tokens, s_out * p_out]
// The first and last are matrix products over all blocks of all tokens; the mixing between them is this
// file's own. On CPU: kron_cpu.h.
#pragma once

#include <cstdint>

#include "kernels/plan.h"

namespace alore::kernels {

struct KronFactors {
  const void* scale;  // [num_experts, s_in, s_out]
  const void* down;   // [num_experts, p_in, rank]
  const void* up;     // [num_experts, rank, p_out]
};

struct KronGradients {
  void* scale;  // like KronFactors, in the factors' dtype; overwritten
  void* down;
  void* up;
};

}  // namespace alore::kernels

#ifdef ALORE_WITH_CUDA
#include "kernels/context.h"

namespace alore::kernels {

// ---- CUDA
// ---------------------------------------------------------------------------------------------------------

// out = beta * out + x @ W', beta 0 or 1. x and out have shape.activation's type, contiguous; out may be x
// where the map is square, since a chunk's rows are all read before any is written.
void kron_forward(const CudaContext& context, const KronShape& shape, const KronPlan& plan,
                  const KronFactors& factors,
                  const void* x,  // [num_tokens, s_in * p_in]
                  float beta,
                  void* out,         // [num_tokens, s_out * p_out]
                  void* workspace);  // plan_kron_forward(shape).workspace_bytes

// grad_x = beta * grad_x + grad_out @ W'^T, beta 0 or 1, unless grad_x is null; and the factors' gradients.
// Two runs on the same input give the same bits: every sum is taken in a fixed order.
void kron_backward(const CudaContext& context, const KronShape& shape, const KronPlan& plan,
                   const KronFactors& factors,
                   const void* x,         // [num_tokens, s_in * p_in]
                   const void* grad_out,  // [num_tokens, s_out * p_out]
                   float beta,
                   void* grad_x,  // [num_tokens, s_in * p_in], or null
                   const KronGradients& grads,
                   void* workspace);  // plan_kron_backward(shape).workspace_bytes

// Steps shared by both directions (kron_factors.cu).

// Factors into the layouts that the GEMMs read: down as [p_in, num_experts * rank], up as [num_experts *
// rank, p_out], both in shape.activation's type, scale in its accumulate type.
void kron_pack_factors(const CudaContext& context, const KronShape& shape, const KronFactors& factors,
                       void* scale, void* down, void* up);

// The way back for gradients, and the last stage of d(scale): partial sums [blocks, num_experts, s_in, s_out]
// added in order.
void kron_unpack_gradients(const CudaContext& context, const KronShape& shape, int64_t blocks,
                           const void* scale_partial, const void* down, const void* up,
                           const KronGradients& grads);

}  // namespace alore::kernels
#endif
