// What a launcher needs from its caller besides pointers and sizes.
#pragma once

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

namespace alore::kernels {

// Launchers enqueue on `stream`, use `blas` with that stream and its current math mode, and neither allocate
// nor synchronise. They throw std::runtime_error when a launch is refused.
struct CudaContext {
  cudaStream_t stream;
  cublasHandle_t blas;
};

}  // namespace alore::kernels
