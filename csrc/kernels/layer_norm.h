// Layer normalisation over the last axis, with the statistics kept for backward.
//   out[t,:] = (x[t,:] - mean[t]) * rstd[t] * weight + bias,  rstd = 1 / sqrt(var + eps), var without
//   Bessel's correction
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace alore::kernels {

// ---- CPU: rows [begin, end), one thread; T is float or double
// ------------------------------------------------------------------

// Overwrites those rows of out, mean and rstd; with statistics_known, mean and rstd are read instead. out may
// be x.
template <typename T>
void layer_norm_cpu(const T* x,       // [num_tokens, embed_dim]
                    const T* weight,  // [embed_dim]
                    const T* bias,    // [embed_dim]
                    double eps, bool statistics_known, int64_t begin, int64_t end, int64_t embed_dim, T* mean,
                    T* rstd,  // [num_tokens]
                    T* out);  // [num_tokens, embed_dim]

// Gradient of out is grad_a + grad_b. Overwrites those rows of grad_x, which may be grad_a or grad_b.
template <typename T>
void layer_norm_backward_cpu(const T* grad_a,  // [num_tokens, embed_dim]
                             const T* grad_b,  // [num_tokens, embed_dim]
                             const T* x, const T* weight, const T* mean, const T* rstd, int64_t begin,
                             int64_t end, int64_t embed_dim,
                             T* grad_x);  // [num_tokens, embed_dim]

// Adds those rows' part to the gradients of weight and bias, [embed_dim] each.
template <typename T>
void layer_norm_affine_backward_cpu(const T* grad_a, const T* grad_b, const T* x, const T* mean,
                                    const T* rstd, int64_t begin, int64_t end, int64_t embed_dim,
                                    T* grad_weight, T* grad_bias);

}  // namespace alore::kernels

#ifdef ALORE_WITH_CUDA
#include "kernels/context.h"

namespace alore::kernels {

// ---- CUDA
// ----------------------------------------------------------------------------------------------------------

struct LayerNormShape {
  int64_t num_tokens = 0;
  int64_t embed_dim = 0;
  DType input = DType::kFloat32;  // of x and its gradient
  DType output =
      DType::kFloat32;  // of out and its gradient: input's type, or 16-bit under fp32 input (autocast)
  DType affine = DType::kFloat32;  // of weight and bias
};

// Overwrites out, mean and rstd.
void layer_norm_forward(const CudaContext& context, const LayerNormShape& shape,
                        const void* x,       // [num_tokens, embed_dim]
                        const void* weight,  // [embed_dim] or null: ones
                        const void* bias,    // [embed_dim] or null: zeros
                        double eps,
                        void* out,    // [num_tokens, embed_dim]
                        void* mean,   // [num_tokens], accumulate type of input
                        void* rstd);  // [num_tokens], accumulate type of input

// out again, from x and the kept statistics: the same bits as layer_norm_forward wrote. Overwrites out.
void layer_norm_recompute(const CudaContext& context, const LayerNormShape& shape, const void* x,
                          const void* weight, const void* bias, const void* mean, const void* rstd,
                          void* out);

// Gradient of out is grad_a + grad_b, each of type `output`; grad_b may be null. Overwrites grad_x.
void layer_norm_backward(const CudaContext& context, const LayerNormShape& shape,
                         const void* grad_a,  // [num_tokens, embed_dim]
                         const void* grad_b,  // [num_tokens, embed_dim] or null
                         const void* x, const void* weight, const void* mean, const void* rstd,
                         void* grad_x);  // [num_tokens, embed_dim]

// Overwrites grad_weight and grad_bias (type `affine`; either may be null). Sums are taken in a fixed order.
void layer_norm_affine_backward(const CudaContext& context, const LayerNormShape& shape, const void* grad_a,
                                const void* grad_b, const void* x, const void* mean, const void* rstd,
                                void* grad_weight, void* grad_bias,
                                int64_t blocks,  // plan_reduce_blocks(num_tokens, 2 * embed_dim)
                                void* partial);  // [blocks, 2, embed_dim], accumulate type of input

}  // namespace alore::kernels
#endif
