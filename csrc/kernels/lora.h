// The parts of h = x W^T + b + ((x A^T) * coeff) B^T (MLAE eq. 7) that sit between its matrix products.
// Row j of A and column j of B are expert row j; coeff[j] carries the mask and 1/(1-p). A masked row (coeff
// 0) gives exact zeros whatever the products hold.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

#ifdef ALORE_WITH_CUDA
#include "kernels/context.h"

namespace alore::kernels {

struct LoraShape {
  int64_t num_tokens = 0;
  int64_t in_features = 0, out_features = 0;
  int64_t rank = 0;  // R, all experts' rows together
  DType activation = DType::kFloat32;
  DType factor = DType::kFloat32;
};

// Elementwise cast of `elements` values. Overwrites out.
void cast(const CudaContext& context, int64_t elements, DType from, const void* in, DType to, void* out);

// scaled[t,j] = coeff[j] * code[t,j], exactly 0 where coeff[j] is 0. Overwrites scaled.
void lora_scale(const CudaContext& context, const LoraShape& shape,
                const void* code,   // [num_tokens, rank], accumulate type
                const void* coeff,  // [rank], factor type
                void* scaled);      // [num_tokens, rank], activation type

// grad_coeff[j] = sum_t code[t,j] * grad_code[t,j], in a fixed order. Overwrites grad_coeff.
void lora_coeff_grad(const CudaContext& context, const LoraShape& shape,
                     const void* code,       // [num_tokens, rank], accumulate type: x A^T
                     const void* grad_code,  // [num_tokens, rank], accumulate type: grad_out B
                     int64_t blocks,         // plan_reduce_blocks(num_tokens, rank)
                     void* partial,          // [blocks, rank], accumulate type
                     void* grad_coeff);      // [rank], factor type

// Gradients of A and B into the factors' dtype; a masked row is exactly 0 even where an activation was not
// finite. Overwrites grad_a and grad_b.
void lora_unpack_gradients(const CudaContext& context, const LoraShape& shape,
                           const void* sum_a,  // [rank, in_features], accumulate type
                           const void* sum_b,  // [out_features, rank], accumulate type
                           const void* coeff,  // [rank], factor type
                           void* grad_a,       // [rank, in_features], factor type
                           void* grad_b);      // [out_features, rank], factor type

}  // namespace alore::kernels
#endif
