// ldmatrix: 8 x 8 matrices of 16-bit values from shared memory into the operands of mma. Rows should be an
// odd number of 16-byte pieces apart: then eight of them lie in different banks.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace alore::kernels {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four matrices, their rows at the lanes' addresses.
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

}  // namespace alore::kernels
