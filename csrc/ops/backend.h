// What the backends' primitives take and return.
#pragma once

#include <c10/core/impl/LocalDispatchKeySet.h>

#include "ops/common.h"

namespace alore::ops {

// The ops choose their own precision: an autocast region around backward or a merge must not lower the ATen
// calls inside.
struct NoAutocast {
  c10::impl::ExcludeDispatchKeyGuard guard{c10::autocast_dispatch_keyset};
};

struct Factors {
  const Tensor& scale;
  const Tensor& down;
  const Tensor& up;
};

struct FactorGrads {
  Tensor scale, down, up;
};

// A call of the whole adapter, for a backend that runs it fused: see kernels/alore.h.
struct AloreCall {
  Tensor x;           // [num_tokens, embed_dim]
  Tensor residual;    // like x, or undefined
  bool norm = false;  // layer norm in front, with weight, bias and eps
  OptTensor weight, bias;
  double eps = 0.0;
  Factors factors;
  OptTensor seed;
  double dropout_p = 0.0;
  bool add_base = true;  // false: the Kronecker map alone
  at::ScalarType out_dtype;
};

inline Tensor zeros_contiguous(const Tensor& t) {
  return at::zeros_like(t, {}, at::MemoryFormat::Contiguous);
}

inline FactorGrads zero_grads(Factors f) {
  return {zeros_contiguous(f.scale), zeros_contiguous(f.down), zeros_contiguous(f.up)};
}

struct Lora {
  const Tensor& a;      // [R, in_features]
  const Tensor& b;      // [out_features, R]
  const Tensor& coeff;  // [R]
};

struct LoraGrads {
  Tensor a, b, coeff;
};

}  // namespace alore::ops
