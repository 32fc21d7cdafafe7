#include "kernels/cuda_common.cuh"
#include "kernels/dropout.h"
#include "kernels/philox.h"

namespace alore::kernels {
namespace {

template <typename T>
__global__ void dropout_add_kernel(int64_t elements, const T* base, const T* branch, const int64_t* seed,
                                   double p, T* out) {
  using Acc = acc_t<T>;
  const uint64_t key = p > 0 ? static_cast<uint64_t>(*seed) : 0;
  const uint32_t threshold = drop_threshold(p);
  const Acc scale = static_cast<Acc>(1.0 / (1.0 - p));
  const int64_t quads = (elements + 3) / 4;
  for (int64_t q = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; q < quads;
       q += int64_t{gridDim.x} * blockDim.x) {
    Philox4 bits{};
    if (p > 0) bits = philox(key, static_cast<uint64_t>(q));
    const int count = static_cast<int>(min(int64_t{4}, elements - q * 4));
    for (int j = 0; j < count; ++j) {
      const int64_t i = q * 4 + j;
      const Acc kept = p <= 0 || bits.v[j] >= threshold ? convert<Acc>(branch[i]) * scale : Acc(0);
      out[i] = convert<T>(base == nullptr ? kept : convert<Acc>(base[i]) + kept);
    }
  }
}

}  // namespace

void dropout_add(const CudaContext& context, DType type, int64_t elements, const void* base,
                 const void* branch, const int64_t* seed, double p, void* out) {
  if (elements == 0) return;
  dispatch(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    dropout_add_kernel<<<grid_for((elements + 3) / 4), kThreads, 0, context.stream>>>(
        elements, static_cast<const T*>(base), static_cast<const T*>(branch), seed, p, static_cast<T*>(out));
  });
  check_launch("dropout_add");
}

}  // namespace alore::kernels
