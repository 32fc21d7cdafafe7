// Dropout whose mask is a function of (seed, element index): nothing is stored between forward and backward.
#pragma once

#include <cstdint>

#include "kernels/dtype.h"

namespace alore::kernels {

// out[i] = (base ? base[i] : 0) + (keep(seed, i) ? branch[i] / (1 - p) : 0) for i in [begin, end), begin a
// multiple of 4. T is float or double. Overwrites out; out may alias base or branch.
template <typename T>
void dropout_add_cpu(const T* base, const T* branch, int64_t seed, double p, int64_t begin, int64_t end,
                     T* out);

}  // namespace alore::kernels

#ifdef ALORE_WITH_CUDA
#include "kernels/context.h"

namespace alore::kernels {

// The same over all `elements`, in `type`, with the seed read on the device (CUDA-graph safe). p = 0 adds
// plainly and ignores the seed, which may then be null.
void dropout_add(const CudaContext& context, DType type, int64_t elements, const void* base,
                 const void* branch, const int64_t* seed, double p, void* out);

}  // namespace alore::kernels
#endif
