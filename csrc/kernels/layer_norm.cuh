// What the norm's two directions share: the affine read in any dtype, and dispatch over the (input, output)
// pairs.
#pragma once

#include "kernels/cuda_common.cuh"
#include "kernels/layer_norm.h"

namespace alore::kernels {

// One warp a row: embed_dim is 96 to 1536, so a row is 3 to 48 elements a lane, and its second and third read
// hit L1.
inline constexpr int kRowsPerBlock = kThreads / 32;

inline unsigned row_blocks(int64_t num_tokens) {
  return static_cast<unsigned>((num_tokens + kRowsPerBlock - 1) / kRowsPerBlock);
}

// Element i of a vector whose dtype is only known at run time; the branch is uniform over the grid.
template <typename Acc>
__device__ __forceinline__ Acc load_as(const void* p, DType type, int64_t i) {
  switch (type) {
    case DType::kFloat64:
      return static_cast<Acc>(static_cast<const double*>(p)[i]);
    case DType::kFloat32:
      return static_cast<Acc>(static_cast<const float*>(p)[i]);
    case DType::kBFloat16:
      return convert<Acc>(static_cast<const __nv_bfloat16*>(p)[i]);
    default:
      return convert<Acc>(static_cast<const __half*>(p)[i]);
  }
}

template <typename Acc>
__device__ __forceinline__ Acc affine(Acc normalised, const void* weight, const void* bias, DType type,
                                      int64_t i) {
  if (weight != nullptr) normalised *= load_as<Acc>(weight, type, i);
  if (bias != nullptr) normalised += load_as<Acc>(bias, type, i);
  return normalised;
}

// f(Tag<In>, Tag<Out>) for equal types and for fp32 input with 16-bit output.
template <typename F>
void dispatch_norm(const LayerNormShape& s, F&& f) {
  if (s.input == s.output) return dispatch(s.input, [&](auto tag) { f(tag, tag); });
  if (s.input == DType::kFloat32 && s.output == DType::kBFloat16)
    return f(Tag<float>{}, Tag<__nv_bfloat16>{});
  if (s.input == DType::kFloat32 && s.output == DType::kFloat16) return f(Tag<float>{}, Tag<__half>{});
  throw std::runtime_error(std::string("layer_norm: no kernel from ") + name_of(s.input) + " to " +
                           name_of(s.output));
}

}  // namespace alore::kernels
