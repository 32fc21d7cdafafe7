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

// The bulk copy engine (sm_90 and later): one thread asks for a whole row, and a barrier in shared memory counts the
// bytes that have landed. Sizes and addresses are multiples of 16 bytes. On earlier devices these do nothing.
__device__ __forceinline__ void landing_init(uint64_t* landing) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(landing));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void landing_expect(uint64_t* landing, int bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(landing));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
#endif
}

__device__ __forceinline__ void copy_bulk(void* shared, const void* from, int bytes, uint64_t* landing) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(landing));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(at)
               : "memory");
#endif
}

// Returns when the landing's phase `parity` (0, then 1, then 0 ...) is complete; the bytes are then visible.
__device__ __forceinline__ void landing_wait(uint64_t* landing, unsigned parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(landing));
  unsigned done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(at), "r"(parity)
        : "memory");
  }
#endif
}

}  // namespace alore::kernels
