#include "kernels/cuda_common.cuh"
#include "kernels/lora.h"

namespace alore::kernels {
namespace {

template <typename Code, typename Acc, typename Out>
__global__ void scale_kernel(int64_t elements, int64_t width, const Code* __restrict__ code,
                             const Acc* __restrict__ effective, Out* __restrict__ scaled) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < elements;
       i += int64_t{gridDim.x} * blockDim.x) {
    const Acc c = effective[i % width];
    scaled[i] = convert<Out>(c == Acc(0) ? Acc(0) : c * convert<Acc>(code[i]));
  }
}

// A block sums its rows; thread (row lane, column) pairs meet in shared memory in a fixed order.
template <typename Code, typename Acc>
__global__ void coeff_partial_kernel(int64_t num_tokens, int64_t rank, int64_t rows_per_block,
                                     const Code* __restrict__ code, const Acc* __restrict__ grad_code,
                                     Acc* __restrict__ partial) {  // [gridDim.x, rank]
  __shared__ Acc sums[kThreads];
  const int64_t begin = blockIdx.x * rows_per_block, end = min(num_tokens, begin + rows_per_block);
  const int lane = threadIdx.x / 32, column_in_tile = threadIdx.x % 32;
  for (int64_t first = 0; first < rank; first += 32) {
    const int64_t j = first + column_in_tile;
    Acc sum = 0;
    if (j < rank) {
      for (int64_t t = begin + lane; t < end; t += kThreads / 32)
        sum += convert<Acc>(code[t * rank + j]) * grad_code[t * rank + j];
    }
    sums[threadIdx.x] = sum;
    __syncthreads();
    if (lane == 0 && j < rank) {
      Acc total = 0;
      for (int l = 0; l < kThreads / 32; ++l) total += sums[l * 32 + column_in_tile];
      partial[blockIdx.x * rank + j] = total;
    }
    __syncthreads();
  }
}

template <typename Acc, typename Factor>
__global__ void coeff_final_kernel(int64_t experts, int64_t expert_rank, int64_t width, int64_t blocks,
                                   const Acc* __restrict__ partial, const Acc* __restrict__ mask,
                                   Factor* __restrict__ grad_coeff) {
  const int64_t e = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (e >= experts) return;
  Acc sum = 0;
  for (int64_t j = e * expert_rank; j < (e + 1) * expert_rank; ++j) {
    for (int64_t b = 0; b < blocks; ++b) sum += partial[b * width + j];
  }
  if (mask != nullptr) sum = mask[e] == Acc(0) ? Acc(0) : sum * mask[e];
  grad_coeff[e] = convert<Factor>(sum);
}

template <typename Acc, typename Factor>
__global__ void unpack_kernel(int64_t in_features, int64_t out_features, int64_t rank, int64_t width,
                              const Acc* __restrict__ sum_a, const Acc* __restrict__ sum_b,
                              const Acc* __restrict__ effective, Factor* __restrict__ grad_a,
                              Factor* __restrict__ grad_b) {
  const int64_t size_a = rank * in_features, size_b = out_features * rank;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size_a + size_b;
       i += int64_t{gridDim.x} * blockDim.x) {
    const bool is_a = i < size_a;
    const int64_t at = is_a ? i : i - size_a, j = is_a ? at / in_features : at % rank;
    const Acc sum = is_a ? sum_a[at] : sum_b[at / rank * width + j];
    (is_a ? grad_a : grad_b)[at] = convert<Factor>(effective[j] == Acc(0) ? Acc(0) : sum);
  }
}

}  // namespace

void lora_scale(const CudaContext& context, const LoraShape& s, DType code_type, const void* code,
                const void* effective, void* scaled) {
  const int64_t width = lora_code_width(s.activation, s.rank), elements = s.num_tokens * width;
  if (elements == 0) return;
  dispatch(s.activation, [&](auto tag) {
    using Out = typename decltype(tag)::type;
    using Acc = acc_t<Out>;
    const auto launch = [&](auto code_tag) {
      using Code = typename decltype(code_tag)::type;
      scale_kernel<<<grid_for(elements), kThreads, 0, context.stream>>>(
          elements, width, static_cast<const Code*>(code), static_cast<const Acc*>(effective),
          static_cast<Out*>(scaled));
    };
    code_type == s.activation ? launch(tag) : launch(Tag<Acc>{});
  });
  check_launch("lora_scale");
}

void lora_coeff_grad(const CudaContext& context, const LoraShape& s, const void* code, const void* grad_code,
                     const void* mask, int64_t blocks, void* partial, void* grad_coeff) {
  const int64_t width = lora_code_width(s.activation, s.rank), experts = s.num_experts();
  const int64_t rows_per_block = (s.num_tokens + blocks - 1) / blocks;
  dispatch(s.activation, [&](auto tag) {
    using T = typename decltype(tag)::type;
    coeff_partial_kernel<T, acc_t<T>><<<static_cast<unsigned>(blocks), kThreads, 0, context.stream>>>(
        s.num_tokens, width, rows_per_block, static_cast<const T*>(code),
        static_cast<const acc_t<T>*>(grad_code), static_cast<acc_t<T>*>(partial));
  });
  check_launch("lora_coeff_partial");
  dispatch_acc(accumulate_type(s.activation), [&](auto acc_tag) {
    dispatch(s.factor, [&](auto factor_tag) {
      using Acc = typename decltype(acc_tag)::type;
      using Factor = typename decltype(factor_tag)::type;
      coeff_final_kernel<<<static_cast<unsigned>((experts + kThreads - 1) / kThreads), kThreads, 0,
                           context.stream>>>(experts, s.expert_rank, width, blocks,
                                             static_cast<const Acc*>(partial), static_cast<const Acc*>(mask),
                                             static_cast<Factor*>(grad_coeff));
    });
  });
  check_launch("lora_coeff_grad");
}

void lora_unpack_gradients(const CudaContext& context, const LoraShape& s, const void* sum_a,
                           const void* sum_b, const void* effective, void* grad_a, void* grad_b) {
  const int64_t width = lora_code_width(s.activation, s.rank);
  const int64_t elements = s.rank * (s.in_features + s.out_features);
  dispatch_acc(accumulate_type(s.activation), [&](auto acc_tag) {
    dispatch(s.factor, [&](auto factor_tag) {
      using Acc = typename decltype(acc_tag)::type;
      using Factor = typename decltype(factor_tag)::type;
      unpack_kernel<<<grid_for(elements), kThreads, 0, context.stream>>>(
          s.in_features, s.out_features, s.rank, width, static_cast<const Acc*>(sum_a),
          static_cast<const Acc*>(sum_b), static_cast<const Acc*>(effective), static_cast<Factor*>(grad_a),
          static_cast<Factor*>(grad_b));
    });
  });
  check_launch("lora_unpack_gradients");
}

}  // namespace alore::kernels
