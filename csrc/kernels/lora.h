// The low-rank side of h = x W^T + b + ((x A^T) * c) B^T (MLAE eq. 7), forward and backward, and the plans by
// which it runs.
//
// Row j of A and column j of B are rank row j; c[j] = coeff[j / expert_rank] * mask[j / expert_rank] carries
// the expert's coefficient, this step's mask and 1/(1-p). A row whose c is 0 gives exact zeros whatever the
// products hold, while the derivative by coeff stays the true one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/dtype.h"

namespace alore::kernels {

struct LoraShape {
  int64_t num_tokens = 0;
  int64_t in_features = 0, out_features = 0;
  int64_t rank = 0;         // R, all experts' rows together
  int64_t expert_rank = 1;  // rows an expert; coeff and mask are [rank / expert_rank]
  DType activation = DType::kFloat32;
  DType factor = DType::kFloat32;

  int64_t num_experts() const { return rank / expert_rank; }
};

// ---- Plans: pure functions of shape, dtype and device limits --------------------------------------------

enum class LoraPath {
  kFold,      // round(W + B diag(c) A) in one kernel, then the base product alone, forward and for dx
  kExtended,  // forward: the rank term inside the base product, [x | t] [W | Bc]^T; one kernel writes [x | t]
  kFused,     // y0 = b + t (Bc)^T in one streaming kernel, onto which the base product accumulates
  kStaged,    // backward: as kFused, sums and factors in registers; R <= 8, in_features up to 768 and
              // out_features up to 2304 in multiples of 32, where two tiles fit shared memory
  kFusedHalf,  // backward: the same kernel twice, over grad_out and over x, where both do not fit at once
  kGemm,       // the side path by matrix products; every shape and dtype
};

constexpr const char* name_of(LoraPath path) {
  switch (path) {
    case LoraPath::kFold:
      return "fold";
    case LoraPath::kExtended:
      return "extended";
    case LoraPath::kFused:
      return "fused";
    case LoraPath::kStaged:
      return "staged";
    case LoraPath::kFusedHalf:
      return "fused-half";
    default:
      return "gemm";
  }
}

// Limits of the device: streaming multiprocessors, and the shared memory that one block may ask for.
struct LoraDevice {
  int num_processors = 0;   // 0: no CUDA device, which leaves kFold and kGemm
  size_t shared_bytes = 0;  // cudaDevAttrMaxSharedMemoryPerBlockOptin
};

struct LoraPlan {
  LoraPath forward = LoraPath::kGemm, backward = LoraPath::kGemm;
  int64_t code_width = 0;        // columns of the code t = x A^T that forward keeps; 0 where it keeps none
  int64_t operand_elements = 0;  // of the packed factors that forward keeps, activation type
  int64_t blocks = 0;            // backward, fused: thread blocks, each of which leaves a partial sum
  int staged_shape = -1;         // backward, staged: which of kStagedShapes
  size_t shared_bytes = 0;       // backward, fused: of the larger kernel
  size_t workspace_bytes = 0;    // backward, fused: all partial sums

  std::string to_string() const;
};

// Rank rows beside each other in one fused pass: mma tiles are 8 wide, and the sums of gradients live in
// shared memory.
inline constexpr int64_t kMaxFusedRank = 16;
// A tile of the fused kernels is 16 tokens by chunks of 32 features.
inline constexpr int64_t kTileTokens = 16, kChunk = 32;

constexpr bool is_16bit(DType t) { return t == DType::kBFloat16 || t == DType::kFloat16; }
constexpr int64_t round_up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

// Columns of the code: whole mma tiles in 16 bits, the padded ones 0.
constexpr int64_t lora_code_width(DType activation, int64_t rank) {
  return is_16bit(activation) ? round_up(rank, 8) : rank;
}

// Whether shape and dtype suit the fused kernels: 16-bit, R <= 16, features in multiples of 8 (16-byte
// loads). Which memory forward keeps depends on this alone, not on the device, so that Meta tensors agree.
constexpr bool lora_packs(const LoraShape& s) {
  return is_16bit(s.activation) && s.rank <= kMaxFusedRank && s.in_features % 8 == 0 &&
         s.out_features % 8 == 0;
}

// Elements of the packed factors: A and B, each in the two orders that the kernels read them in.
constexpr int64_t lora_operand_elements(const LoraShape& s) {
  if (!lora_packs(s)) return 0;
  return 2 * (round_up(s.in_features, kChunk) + round_up(s.out_features, kChunk)) * round_up(s.rank, 8);
}

// `weight`: the dtype of W. float32 under a 16-bit activation folds: nothing is lost that casting W would not
// lose too. A weight stored in 16 bits never folds: an update below half an ulp of it would vanish.
constexpr bool lora_folds(DType activation, DType weight) {
  return is_16bit(activation) && weight == DType::kFloat32;
}

LoraPlan plan_lora(const LoraShape& shape, DType weight, LoraDevice device);

}  // namespace alore::kernels

#ifdef ALORE_WITH_CUDA
#include "kernels/context.h"

namespace alore::kernels {

// torch's generator as a kernel sees it. Under CUDA graph capture seed and offset are read on the device, so
// that every replay draws anew.
struct PhiloxSource {
  uint64_t seed = 0, offset = 0;      // offset: added to *offset_ptr where that is given
  const int64_t* seed_ptr = nullptr;  // device pointers, or null
  const int64_t* offset_ptr = nullptr;
};

// How c comes about. Either `mask` is given, or it is drawn (draw) or all 1.
struct Coefficients {
  const void* coeff = nullptr;  // [num_experts], factor type
  const void* mask = nullptr;   // [num_experts], accumulate type: 0 or 1/(1-p). null: see draw
  bool draw = false;
  double p = 0.0;  // probability of masking an expert
  PhiloxSource philox;
  void* mask_out = nullptr;  // [num_experts], accumulate type, or null
};

// Philox draws that one call takes from the generator, in torch's units.
inline constexpr uint64_t kPhiloxIncrement = 4;

struct Factors2 {
  const void* a = nullptr;  // [rank, in_features], factor type, contiguous
  const void* b = nullptr;  // [out_features, rank], factor type, contiguous
};

// ---- Fold -----------------------------------------------------------------------------------------------

// folded = round(weight + b diag(c) a), the sum in fp32. Overwrites folded and mask_out.
void lora_fold(const CudaContext& context, const LoraShape& shape, Factors2 factors,
               const Coefficients& coefficients,
               const void* weight,  // [out_features, in_features], float32, contiguous
               void* folded);       // [out_features, in_features], activation type

// ---- Fused: lora_packs(shape); x, grad_out, y and dx contiguous and 16-byte aligned ----------------------

// Rounds a, and b * c, to the activation type in the orders that the fused kernels read. Overwrites packed,
// mask_out and, where asked for, extended = [weight | b c].
void lora_pack(const CudaContext& context, const LoraShape& shape, Factors2 factors,
               const Coefficients& coefficients,
               void* packed,        // [lora_operand_elements], activation type, 16-byte aligned
               const void* weight,  // [out_features, in_features], activation type, 16-byte aligned; or null
               void* extended);     // [out_features, in_features + code_width], likewise; or null with weight

// code = x a^T; y = bias + (code * c) b^T, rounded once; extended = [x | code], masked columns 0. Overwrites
// code, and of y and extended those that are not null.
void lora_fused_forward(const CudaContext& context, const LoraShape& shape, const Coefficients& coefficients,
                        const void* packed,
                        const void* x,     // [num_tokens, in_features]
                        const void* bias,  // [out_features] or null, 16-byte aligned
                        void* code,        // [num_tokens, code_width]
                        void* y,           // [num_tokens, out_features] or null
                        void* extended);   // [num_tokens, in_features + code_width] or null

struct LoraGradients {
  void* a = nullptr;      // [rank, in_features], factor type
  void* b = nullptr;      // [out_features, rank], factor type
  void* coeff = nullptr;  // [num_experts], factor type
};

// One pass over grad_out and one over x. With dt = grad_out (b c): dx = dt a, grad a = dt^T x,
// grad b = (grad_out^T code) c, grad coeff[e] = mask[e] * sum_{j in e, o} b[o,j] (grad_out^T code)[o,j].
// Every sum has a fixed order. Overwrites dx (unless null) and the gradients.
void lora_fused_backward(const CudaContext& context, const LoraShape& shape, const LoraPlan& plan,
                         Factors2 factors, const Coefficients& coefficients, const void* packed,
                         const void* x,         // [num_tokens, in_features]
                         const void* grad_out,  // [num_tokens, out_features]
                         const void* code,      // [num_tokens, code_width]
                         void* dx,              // [num_tokens, in_features] or null
                         LoraGradients gradients,
                         void* workspace);  // [plan.workspace_bytes], 16-byte aligned

// ---- General: the parts between matrix products ----------------------------------------------------------

// Rounds a and b to the activation type, padded with zeros to code_width rank rows; writes c, padded too.
// clear_a, clear_b: masked rank rows become 0 as well, so that a product passes on nothing of them that is
// not finite. Overwrites all outputs.
void lora_pack_rows(const CudaContext& context, const LoraShape& shape, Factors2 factors,
                    const Coefficients& coefficients, bool clear_a, bool clear_b,
                    void* a,           // [code_width, in_features], activation type
                    void* b,           // [out_features, code_width], activation type
                    void* effective);  // [code_width], accumulate type

// scaled[t,j] = effective[j] * code[t,j], exactly 0 where effective[j] is 0. Overwrites scaled.
void lora_scale(const CudaContext& context, const LoraShape& shape, DType code_type,
                const void* code,       // [num_tokens, code_width]
                const void* effective,  // [code_width], accumulate type
                void* scaled);          // [num_tokens, code_width], activation type

// grad_coeff[e] = mask[e] * sum_{t, j in e} code[t,j] * grad_code[t,j], in a fixed order. Overwrites
// grad_coeff.
void lora_coeff_grad(const CudaContext& context, const LoraShape& shape,
                     const void* code,       // [num_tokens, code_width], activation type: x A^T
                     const void* grad_code,  // [num_tokens, code_width], accumulate type: grad_out B
                     const void* mask,       // [num_experts], accumulate type, or null
                     int64_t blocks,         // plan_reduce_blocks(num_tokens, code_width)
                     void* partial,          // [blocks, code_width], accumulate type
                     void* grad_coeff);      // [num_experts], factor type

// Gradients of A and B into the factors' dtype; a masked row is exactly 0 even where an activation was not
// finite. Overwrites grad_a and grad_b.
void lora_unpack_gradients(const CudaContext& context, const LoraShape& shape,
                           const void* sum_a,      // [code_width, in_features], accumulate type
                           const void* sum_b,      // [out_features, code_width], accumulate type
                           const void* effective,  // [code_width], accumulate type
                           void* grad_a,           // [rank, in_features], factor type
                           void* grad_b);          // [out_features, rank], factor type

}  // namespace alore::kernels
#endif
