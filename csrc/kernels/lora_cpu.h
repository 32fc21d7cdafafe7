// The masked low-rank term of MLAE on CPU, one thread over rows [begin, end) of tokens, in chunks that stay
// in the second-level cache. T is float or double. Experts whose coeff is 0 are left out of every product but
// the two that coeff's own gradient needs.
#pragma once

#include <cstdint>

namespace alore::kernels {

struct LoraShapeCpu {
  int64_t num_tokens, in_features, out_features, rank;
};

// Elements of T, as in kron_cpu.h.
int64_t lora_packed_size_cpu(const LoraShapeCpu& shape);
int64_t lora_scratch_size_cpu(const LoraShapeCpu& shape);
int64_t lora_partial_size_cpu(const LoraShapeCpu& shape);
int64_t lora_partials_cpu(const LoraShapeCpu& shape);
int64_t lora_chunk_tokens_cpu(const LoraShapeCpu& shape);

// Lays the factors out, experts with a coeff other than 0 first. Returns how many those are.
template <typename T>
int64_t lora_pack_cpu(const LoraShapeCpu& shape,
                      const T* a,      // [rank, in_features]
                      const T* b,      // [out_features, rank]
                      const T* coeff,  // [rank]
                      T* packed,
                      int64_t* order);  // [rank]: the expert at each place

// out += (x @ a^T * coeff) @ b^T
template <typename T>
void lora_forward_cpu(const LoraShapeCpu& shape, const T* packed, int64_t active,
                      const T* x,  // [num_tokens, in_features]
                      int64_t begin, int64_t end,
                      T* out,  // [num_tokens, out_features]
                      T* scratch);

// Adds the term's part to those rows of grad_x unless it is null, and overwrites `partial`.
template <typename T>
void lora_backward_cpu(const LoraShapeCpu& shape, const T* packed, int64_t active, const T* x,
                       const T* grad_out, int64_t begin, int64_t end, T* grad_x, T* partial, T* scratch);

// Adds `parts` partial sums in order; rows and columns of experts with coeff 0 become 0.
template <typename T>
void lora_reduce_cpu(const LoraShapeCpu& shape, int64_t active, const int64_t* order, const T* partials,
                     int64_t parts, T* grad_a, T* grad_b, T* grad_coeff);

}  // namespace alore::kernels
