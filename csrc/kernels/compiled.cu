#include "kernels/alore.h"
#include "kernels/cuda_common.cuh"

namespace alore::kernels {
namespace {

__global__ void probe_kernel() {}

}  // namespace

int compiled_capability() {
  static std::array<std::atomic<int>, 16> known{};  // by device; further ones ask every time
  int device = 0;
  check(cudaGetDevice(&device), "compiled_capability");
  const bool kept = device < static_cast<int>(known.size());
  if (kept && known[device].load() != 0) return known[device].load();
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe_kernel)),
        "compiled_capability");
  if (kept) known[device] = attributes.ptxVersion;
  return attributes.ptxVersion;
}

}  // namespace alore::kernels
