// The coefficients of the low-rank linears, as kernels read them.
#pragma once

#include "kernels/cuda_common.cuh"
#include "kernels/lora.h"

namespace alore::kernels {

// c as every fused kernel reads it: coeff times mask, 0 in the padded rank rows.
struct RankScale {
  const void* coeff;
  const void* mask;  // null: 1
  bool wide;         // coeff is float32; otherwise it has the activation type
  int rank, expert_rank;

  template <typename T>
  __device__ __forceinline__ float at(int j) const {
    if (j >= rank) return 0.0f;
    const int e = j / expert_rank;
    const float c =
        wide ? static_cast<const float*>(coeff)[e] : convert<float>(static_cast<const T*>(coeff)[e]);
    return mask == nullptr ? c : c * static_cast<const float*>(mask)[e];
  }
};

inline RankScale rank_scale(const LoraShape& s, const Coefficients& c) {
  return {c.coeff, c.mask, s.factor == DType::kFloat32, static_cast<int>(s.rank),
          static_cast<int>(s.expert_rank)};
}

}  // namespace alore::kernels
