// A layer norm and the low-rank linear behind it,
//   n = layer_norm(x),  h = n W^T + b + ((n A^T) * c) B^T   (lora.h has the linear's part),
// with one pass over x in forward and one in backward. n is what the base product reads, and is not kept:
// backward needs x, the norm's statistics and the code n A^T.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/alore.h"
#include "kernels/lora.h"

namespace alore::kernels {

struct NormLoraShape {
  LoraShape linear;
  DType weight = DType::kFloat32;  // of W
  DType affine = DType::kFloat32;  // of the norm's weight and bias
};

// One launch forward. Backward one over grad_out, the base product, one over x, and one that adds up the sums
// of both. bfloat16 alone, W too: R = rstd * grad_code, which backward rounds, needs its range.
struct NormLoraPlan {
  bool fused = false;
  const char* reason = "";  // why not, where it is not
  LoraPlan linear;          // fused: its backward is staged
  int forward_blocks = 0, forward_shared_bytes = 0;
  int backward_blocks = 0, backward_shared_bytes = 0;
  bool overlaps_launches = false;  // each begins while the one before ends (9.0 and later)
  size_t workspace_bytes = 0;      // backward

  std::string to_string() const;
};

NormLoraPlan plan_norm_lora(const NormLoraShape& shape, const DeviceLimits& device);

// Columns behind in_features in a row of `extended`: the code's. The same on every device, so that Meta
// tensors agree: 0 for what is never fused.
constexpr int64_t norm_lora_padding(const LoraShape& s, DType weight) {
  const bool fits = s.activation == DType::kBFloat16 && weight == DType::kBFloat16 && s.rank <= 8 &&
                    s.in_features % 8 == 0 && s.out_features % 8 == 0;
  return fits ? lora_code_width(s.activation, s.rank) : 0;
}

}  // namespace alore::kernels

#ifdef ALORE_WITH_CUDA
#include "kernels/context.h"

namespace alore::kernels {

struct NormLoraForwardArgs {
  const void* x = nullptr;  // [num_tokens, in_features], 16-byte aligned
  AloreNormArgs norm;
  Factors2 factors;
  Coefficients coefficients;
  const void* weight = nullptr;            // [out_features, in_features], 16-byte aligned
  void* extended = nullptr;                // [num_tokens, in_features + 8]: n | code
  void* extended_weight = nullptr;         // [out_features, in_features + 8]: W | B c
  void* packed = nullptr;                  // as lora_pack writes it
  void* code = nullptr;                    // [num_tokens, 8]: n A^T, columns from `rank` on 0
  float *mean = nullptr, *rstd = nullptr;  // [num_tokens]
};

// Overwrites extended, extended_weight, packed, code, mean, rstd and the coefficients' mask_out. Needs a plan
// that is fused.
void norm_lora_forward(const CudaContext& context, const NormLoraShape& shape, const NormLoraPlan& plan,
                       const NormLoraForwardArgs& args);

struct NormLoraBackwardArgs {
  const void* grad_out = nullptr;         // [num_tokens, out_features]
  const void* grad_normalised = nullptr;  // [num_tokens, in_features]: grad_out W; null without grad_x
  const void* x = nullptr;
  AloreNormArgs norm;
  const float *mean = nullptr, *rstd = nullptr;
  Factors2 factors;
  Coefficients coefficients;
  const void *packed = nullptr, *code = nullptr;  // as forward left them
  void* grad_code = nullptr;                      // [num_tokens, 8]: grad_out (B c), masked columns 0
  void* grad_x = nullptr;                         // [num_tokens, in_features] or null
  LoraGradients gradients;
  void* workspace = nullptr;  // [plan.workspace_bytes], 16-byte aligned
};

// The half that reads grad_out: overwrites grad_code. Needs a plan that is fused.
void norm_lora_output_backward(const CudaContext& context, const NormLoraShape& shape,
                               const NormLoraPlan& plan, const NormLoraBackwardArgs& args);

// The half that reads x, behind the other and the base product. With dn = grad_normalised + grad_code A:
// grad_x is its gradient through the norm, grad a = grad_code^T n; grad b and grad coeff as lora.h has them.
// Sums in a fixed order. Overwrites grad_x and the gradients.
void norm_lora_backward(const CudaContext& context, const NormLoraShape& shape, const NormLoraPlan& plan,
                        const NormLoraBackwardArgs& args);

}  // namespace alore::kernels
#endif
