#include "kernels/gemm.h"

#include <stdexcept>
#include <string>

#include "kernels/cuda_common.cuh"

namespace alore::kernels {
namespace {

cudaDataType cuda_type(DType t) {
  switch (t) {
    case DType::kFloat64:
      return CUDA_R_64F;
    case DType::kFloat32:
      return CUDA_R_32F;
    case DType::kBFloat16:
      return CUDA_R_16BF;
    default:
      return CUDA_R_16F;
  }
}

cublasOperation_t blas_op(Op op) { return op == Op::kNone ? CUBLAS_OP_N : CUBLAS_OP_T; }

}  // namespace

void gemm(const CudaContext& context, Op op_a, Op op_b, int64_t m, int64_t n, int64_t k, DType in,
          const void* a, int64_t lda, const void* b, int64_t ldb, float beta, DType out_type, void* out,
          int64_t ldout) {
  if (m == 0 || n == 0) return;
  if (k <= 0) throw std::runtime_error("gemm: k must be positive, got " + std::to_string(k));
  const double alpha64 = 1.0, beta64 = beta;
  const float alpha32 = 1.0f, beta32 = beta;
  const bool wide = in == DType::kFloat64;
  const void* alpha_ptr = wide ? static_cast<const void*>(&alpha64) : &alpha32;
  const void* beta_ptr = wide ? static_cast<const void*>(&beta64) : &beta32;
  // cuBLAS is column-major: the row-major product a @ b is its b^T-by-a^T product, so the operands trade
  // places.
  const cublasStatus_t status =
      cublasGemmEx_64(context.blas, blas_op(op_b), blas_op(op_a), n, m, k, alpha_ptr, b, cuda_type(in), ldb,
                      a, cuda_type(in), lda, beta_ptr, out, cuda_type(out_type), ldout,
                      wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
  if (status != CUBLAS_STATUS_SUCCESS) {
    throw std::runtime_error(std::string("gemm: cuBLAS refused [") + std::to_string(m) + ", " +
                             std::to_string(k) + "] @ [" + std::to_string(k) + ", " + std::to_string(n) +
                             "] in " + name_of(in) + ": " + cublasGetStatusString(status));
  }
}

}  // namespace alore::kernels
