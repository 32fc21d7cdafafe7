// Element types that the kernels take, and the type each one is accumulated in. Torch-free.
#pragma once

#include <cstddef>
#include <cstdint>

namespace alore::kernels {

enum class DType : int32_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

constexpr size_t size_of(DType t) { return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2; }

// Products and sums are taken in fp32, or in fp64 for fp64 tensors.
constexpr DType accumulate_type(DType t) { return t == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

constexpr const char* name_of(DType t) {
  switch (t) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    default:
      return "float16";
  }
}

}  // namespace alore::kernels
