// Copies from global to shared memory that do not pass through registers (sm_80 and later).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace alore::kernels {

// 16 bytes, or 16 zeros where `there` is false; `from` is an address that may be read either way.
__device__ __forceinline__ void copy_async_16(void* shared, const void* from, bool there) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// 4 bytes, or zeros.
__device__ __forceinline__ void copy_async_4(void* shared, const void* from, bool there) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = there ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Waits for this thread's own copies; a barrier makes them visible to the block.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace alore::kernels
