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

inline Tensor zeros_contiguous(const Tensor& t) {
  return at::zeros_like(t, {}, at::MemoryFormat::Contiguous);
}

inline FactorGrads zero_grads(Factors f) {
  return {zeros_contiguous(f.scale), zeros_contiguous(f.down), zeros_contiguous(f.up)};
}

}  // namespace alore::ops
