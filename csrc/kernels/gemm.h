// Row-major matrix products on cuBLAS.
#pragma once

#include <cstdint>

#include "kernels/context.h"
#include "kernels/dtype.h"

namespace alore::kernels {

enum class Op { kNone, kTranspose };

// out[m, n] = op(a) @ op(b) + beta * out, row-major, sums in fp32 (fp64 for fp64). op(a) is [m, k], op(b) is
// [k, n]; a and b have type `in`; `out_type` is `in` or its accumulate type. lda, ldb, ldout count elements
// from row to row as stored. Does nothing when m or n is 0; k = 0 needs beta handling by the caller and is
// refused.
void gemm(const CudaContext& context, Op op_a, Op op_b, int64_t m, int64_t n, int64_t k, DType in,
          const void* a, int64_t lda, const void* b, int64_t ldb, float beta, DType out_type, void* out,
          int64_t ldout);

}  // namespace alore::kernels
