// What every launch from torch tensors needs: the stream and cuBLAS handle, the device's limits, workspaces,
// raw pointers, the base product of the low-rank linears.
#pragma once

#include <ATen/cuda/CUDAContext.h>

#include "kernels/alore.h"
#include "kernels/context.h"
#include "kernels/gemm.h"
#include "ops/common.h"

namespace alore::ops {

// torch's handle for this thread and stream: its math mode follows torch.backends.cuda.matmul.allow_tf32.
inline kernels::CudaContext current_context() {
  return {at::cuda::getCurrentCUDAStream().stream(), at::cuda::getCurrentCUDABlasHandle()};
}

// For launches that call no cuBLAS: fetching the handle takes longer than a launch.
inline kernels::CudaContext stream_context() { return {at::cuda::getCurrentCUDAStream().stream(), nullptr}; }

inline Tensor bytes(size_t count, const Tensor& like) {
  return at::empty({static_cast<int64_t>(count)}, like.options().dtype(at::kByte));
}

inline const void* read(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
inline const void* read(const OptTensor& t) { return t.has_value() ? read(*t) : nullptr; }
inline void* write(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

inline OptTensor contiguous(const OptTensor& t) {
  if (!t.has_value() || !t->defined()) return std::nullopt;
  return t->contiguous();
}

// kernels/alore.h wants rows at multiples of 16 bytes; a view may start anywhere.
inline Tensor aligned(const Tensor& t) {
  if (!t.defined() || reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0) return t;
  return t.clone();
}

// out += x @ weight^T (forward) or out += grad @ weight (backward), in the activations' dtype.
inline void add_base_product(const kernels::CudaContext& context, const Tensor& rows, const Tensor& weight,
                             bool transposed, const Tensor& out) {
  const Tensor w = weight.contiguous();
  kernels::gemm(context, kernels::Op::kNone, transposed ? kernels::Op::kTranspose : kernels::Op::kNone,
                rows.size(0), out.size(1), rows.size(1), kernel_dtype(rows.scalar_type()), read(rows),
                rows.size(1), read(w), w.size(1), 1.0f, kernel_dtype(rows.scalar_type()), write(out),
                out.size(1));
}

inline kernels::DeviceLimits device_limits() {
  const cudaDeviceProp* p = at::cuda::getCurrentDeviceProperties();
  const kernels::DeviceLimits device{10 * p->major + p->minor, p->multiProcessorCount,
                                     static_cast<int64_t>(p->sharedMemPerBlockOptin)};
  return kernels::limits_of_build(device, kernels::compiled_capability());
}

}  // namespace alore::ops
