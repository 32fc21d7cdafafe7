// The Kronecker map of kron.h on CPU, with the layer norm in front of it and its residual, one thread over
// rows [begin, end) of tokens. Tokens go through in chunks that stay in the second-level cache from the norm
// to the last product: activations are read once and written once. T is float or double.
#pragma once

#include <cstdint>

#include "kernels/plan.h"

namespace alore::kernels {

// Tokens a chunk, at least 1.
int64_t kron_chunk_tokens_cpu(const KronShape& shape);

// Elements of T: of the factors as laid out by kron_pack_cpu, of one thread's scratch, and of one partial sum
// of the factors' gradients (with those of the norm's weight and bias behind them).
int64_t kron_packed_size_cpu(const KronShape& shape);
int64_t kron_scratch_size_cpu(const KronShape& shape);
int64_t kron_partial_size_cpu(const KronShape& shape);

// Partial sums that a backward is cut into. The shape alone decides, so results do not change with the number
// of threads.
int64_t kron_partials_cpu(const KronShape& shape);

template <typename T>
void kron_pack_cpu(const KronShape& shape,
                   const T* scale,  // [num_experts, s_in, s_out]
                   const T* down,   // [num_experts, p_in, rank]
                   const T* up,     // [num_experts, rank, p_out]
                   T* packed);

template <typename T>
struct KronNormCpu {
  const T* weight;  // [embed_dim]
  const T* bias;    // [embed_dim]
  double eps;       // forward only
  T* mean;          // [num_tokens]; forward writes them, backward reads them
  T* rstd;
};

// Without norm: out = beta * out + x @ W', beta 0 or 1; out may be x where the map is square.
// With it: out = y + y @ W', y = layer_norm(x), beta ignored.
template <typename T>
void kron_forward_cpu(const KronShape& shape, const T* packed,
                      const T* x,  // [num_tokens, s_in * p_in]
                      const KronNormCpu<T>* norm, bool beta, int64_t begin, int64_t end,
                      T* out,       // [num_tokens, s_out * p_out]
                      T* scratch);  // kron_scratch_size_cpu

// Overwrites `partial` with those tokens' part of the factors' gradients, and writes their rows of grad_x
// unless it is null. Without norm: grad_x = beta * grad_x + grad_branch @ W'^T. With it: grad_x = norm's
// backward of grad_base + grad_branch @ W'^T; the branch's gradient differs from the base's by a dropout
// mask, if any.
template <typename T>
void kron_backward_cpu(const KronShape& shape, const T* packed, const T* x, const T* grad_base,
                       const T* grad_branch, const KronNormCpu<T>* norm, bool beta, bool affine,
                       int64_t begin, int64_t end, T* grad_x, T* partial, T* scratch);

// Adds `parts` partial sums in order and writes the gradients in the factors' own layouts. grad_weight and
// grad_bias may be null.
template <typename T>
void kron_reduce_cpu(const KronShape& shape, const T* partials, int64_t parts, T* grad_scale, T* grad_down,
                     T* grad_up, T* grad_weight, T* grad_bias);

}  // namespace alore::kernels
