// Conversions, dispatch over element types and launch checks shared by the CUDA kernels.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels/context.h"
#include "kernels/dtype.h"

namespace alore::kernels {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

// What a kernel may ask for beyond 48 KiB of shared memory, raised once a device rather than at every launch.
// One static object a kernel.
class SharedMemoryGrants {
 public:
  void allow(const void* kernel, int bytes, const char* what) {
    int device = 0;
    check(cudaGetDevice(&device), what);
    const bool kept = device < static_cast<int>(granted_.size());
    if (kept && granted_[device].load() >= bytes) return;
    // Under the lock, so that a smaller grant never comes last.
    const std::lock_guard lock(mutex_);
    const int most = kept ? std::max(bytes, granted_[device].load()) : bytes;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most), what);
    if (kept) granted_[device] = most;
  }

 private:
  std::mutex mutex_;
  std::array<std::atomic<int>, 16> granted_{};  // by device; further ones ask every time
};

// The most shared memory that a block may have where this is compiled for.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
inline constexpr int kMostSharedBytes = 227 * 1024;
#elif __CUDA_ARCH__ == 800 || __CUDA_ARCH__ == 870
inline constexpr int kMostSharedBytes = 163 * 1024;
#else
inline constexpr int kMostSharedBytes = 99 * 1024;
#endif

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Rounds to nearest even. 16-bit types go through float explicitly: torch's build flags switch their implicit
// conversions off.
template <typename To, typename From>
__device__ __forceinline__ To convert(From v) {
  if constexpr (std::is_same_v<To, From>) {
    return v;
  } else if constexpr (std::is_same_v<From, __nv_bfloat16>) {
    return convert<To>(__bfloat162float(v));
  } else if constexpr (std::is_same_v<From, __half>) {
    return convert<To>(__half2float(v));
  } else if constexpr (std::is_same_v<To, __nv_bfloat16>) {
    return __float2bfloat16(static_cast<float>(v));
  } else if constexpr (std::is_same_v<To, __half>) {
    return __float2half(static_cast<float>(v));
  } else {
    return static_cast<To>(v);
  }
}

template <typename T>
struct Tag {
  using type = T;
};

// Calls f(Tag<T>) with the C++ type of `t`.
template <typename F>
void dispatch(DType t, F&& f) {
  switch (t) {
    case DType::kFloat64:
      return f(Tag<double>{});
    case DType::kFloat32:
      return f(Tag<float>{});
    case DType::kBFloat16:
      return f(Tag<__nv_bfloat16>{});
    case DType::kFloat16:
      return f(Tag<__half>{});
  }
}

// The same for a type that sums are taken in: double or float.
template <typename F>
void dispatch_acc(DType t, F&& f) {
  return t == DType::kFloat64 ? f(Tag<double>{}) : f(Tag<float>{});
}

inline constexpr int kThreads = 256;

// Blocks for a grid-stride loop over `elements`.
inline unsigned grid_for(int64_t elements, int threads = kThreads) {
  constexpr int64_t kMaxBlocks = 132 * 16;
  return static_cast<unsigned>(std::clamp<int64_t>((elements + threads - 1) / threads, 1, kMaxBlocks));
}

template <typename T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// Of a launch that may begin before the last one on its stream has ended (programmatic stream serialization,
// sm_90): waits until all before it is done and visible. Elsewhere launches follow each other anyway.
__device__ __forceinline__ void wait_for_launches_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets such a launch's blocks take the places that this one's leave.
__device__ __forceinline__ void allow_next_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// kernel<<<...>>>(args...), which calls wait_for_launches_before first thing; where `overlaps`, its blocks
// may take their places while the last launch on the stream ends. In a CUDA graph too.
template <typename... Params, typename... Args>
void launch_overlapping(void (*kernel)(Params...), const CudaContext& context, int blocks, int threads,
                        int shared_bytes, bool overlaps, const char* what, const Args&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = context.stream;
  config.attrs = &attribute;
  config.numAttrs = overlaps ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, args...), what);
}

// 16 bytes in one instruction: left to itself the compiler has split these stores in four, which cost more in
// the L2 cache than all the rest of a tile.
__device__ __forceinline__ void store_16(void* p, const uint4& v) {
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

}  // namespace alore::kernels
