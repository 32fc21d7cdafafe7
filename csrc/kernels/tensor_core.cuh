// The warp's matrix instructions (sm_80 and later): mma, and ldmatrix and movmatrix, which bring 16-bit
// values into the order of its operands.
//
// A lane (g, c) = (lane / 4, lane % 4) holds, of an 8 x 8 matrix, columns 2c and 2c + 1 of row g in one
// register.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace alore::kernels {

// d[16, 8] += a[16, 16] @ b[16, 8]. Not volatile: the compiler may move other work between products.
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    uint32_t b0, uint32_t b1) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
#endif
}

template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  mma<T>(d, a[0], a[1], a[2], a[3], b0, b1);
}

// d[16, 8] += a[16, 8] @ b[8, 8]
template <typename T>
__device__ __forceinline__ void mma8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b));
  } else {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b));
  }
#endif
}

// Transposes an 8 x 8 matrix that the warp holds.
__device__ __forceinline__ uint32_t transpose8x8(uint32_t v) {
  uint32_t out;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(v));
  return out;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four matrices from shared memory, their rows at the lanes' addresses. Rows should be an odd number of
// 16-byte pieces apart: then eight of them lie in different banks.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

// Two of them, of which the first 16 lanes name the rows.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&m)[2], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(m[0]), "=r"(m[1])
               : "r"(address)
               : "memory");
}

// A lane's part of the addresses of a [16, 16] piece of rows `stride` bytes apart: as the A operand, or, read
// transposed, as the B operand that sums over the rows.
__device__ __forceinline__ uint32_t operand_rows(int lane, int stride) {
  return (lane % 16) * stride + lane / 16 * 16;
}

// The same as the B operand that sums over the columns, two tiles of 8 rows.
__device__ __forceinline__ uint32_t operand_columns(int lane, int stride) {
  return (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 16;
}

// The same, read transposed, as the A operand whose rows are the piece's columns.
__device__ __forceinline__ uint32_t operand_turned(int lane, int stride) {
  return (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 16;
}

// The [16, 16] tile at `tile` (row-major, `stride` elements a row) as the A operand of mma, and its
// transpose.
template <typename T>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const T* tile, int stride, int lane) {
  load_matrices(a, shared_address(tile + (lane % 16) * stride + lane / 16 * 8));
}

template <typename T>
__device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], const T* tile, int stride, int lane) {
  load_matrices_transposed(a, shared_address(tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * 8));
}

}  // namespace alore::kernels
