#include "kernels/cuda_common.cuh"
#include "kernels/lora.h"

namespace alore::kernels {
namespace {

template <typename From, typename To>
__global__ void cast_kernel(int64_t elements, const From* __restrict__ in, To* __restrict__ out) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < elements;
       i += int64_t{gridDim.x} * blockDim.x) {
    out[i] = convert<To>(in[i]);
  }
}

template <typename Acc, typename Factor, typename Out>
__global__ void scale_kernel(int64_t elements, int64_t rank, const Acc* __restrict__ code,
                             const Factor* __restrict__ coeff, Out* __restrict__ scaled) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < elements;
       i += int64_t{gridDim.x} * blockDim.x) {
    const Acc c = convert<Acc>(coeff[i % rank]);
    scaled[i] = convert<Out>(c == Acc(0) ? Acc(0) : c * code[i]);
  }
}

// A block sums its rows; thread (row lane, column) pairs meet in shared memory in a fixed order.
template <typename Acc>
__global__ void coeff_partial_kernel(int64_t num_tokens, int64_t rank, int64_t rows_per_block,
                                     const Acc* __restrict__ code, const Acc* __restrict__ grad_code,
                                     Acc* __restrict__ partial) {  // [gridDim.x, rank]
  __shared__ Acc sums[kThreads];
  const int64_t begin = blockIdx.x * rows_per_block, end = min(num_tokens, begin + rows_per_block);
  const int lane = threadIdx.x / 32, column_in_tile = threadIdx.x % 32;
  for (int64_t first = 0; first < rank; first += 32) {
    const int64_t j = first + column_in_tile;
    Acc sum = 0;
    if (j < rank) {
      for (int64_t t = begin + lane; t < end; t += kThreads / 32)
        sum += code[t * rank + j] * grad_code[t * rank + j];
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
__global__ void coeff_final_kernel(int64_t rank, int64_t blocks, const Acc* __restrict__ partial,
                                   Factor* __restrict__ grad_coeff) {
  const int64_t j = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (j >= rank) return;
  Acc sum = 0;
  for (int64_t b = 0; b < blocks; ++b) sum += partial[b * rank + j];
  grad_coeff[j] = convert<Factor>(sum);
}

template <typename Acc, typename Factor>
__global__ void unpack_kernel(int64_t size_a, int64_t size_b, int64_t in_features, int64_t rank,
                              const Acc* __restrict__ sum_a, const Acc* __restrict__ sum_b,
                              const Factor* __restrict__ coeff, Factor* __restrict__ grad_a,
                              Factor* __restrict__ grad_b) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size_a + size_b;
       i += int64_t{gridDim.x} * blockDim.x) {
    const bool is_a = i < size_a;
    const int64_t j = is_a ? i : i - size_a;
    const bool masked = convert<Acc>(coeff[is_a ? j / in_features : j % rank]) == Acc(0);
    const Acc sum = masked ? Acc(0) : (is_a ? sum_a[j] : sum_b[j]);
    (is_a ? grad_a : grad_b)[j] = convert<Factor>(sum);
  }
}

}  // namespace

void cast(const CudaContext& context, int64_t elements, DType from, const void* in, DType to, void* out) {
  if (elements == 0) return;
  dispatch(from, [&](auto from_tag) {
    dispatch(to, [&](auto to_tag) {
      using From = typename decltype(from_tag)::type;
      using To = typename decltype(to_tag)::type;
      cast_kernel<<<grid_for(elements), kThreads, 0, context.stream>>>(elements, static_cast<const From*>(in),
                                                                       static_cast<To*>(out));
    });
  });
  check_launch("cast");
}

void lora_scale(const CudaContext& context, const LoraShape& s, const void* code, const void* coeff,
                void* scaled) {
  const int64_t elements = s.num_tokens * s.rank;
  if (elements == 0) return;
  dispatch(s.activation, [&](auto tag) {
    dispatch(s.factor, [&](auto factor_tag) {
      using Out = typename decltype(tag)::type;
      using Acc = acc_t<Out>;
      using Factor = typename decltype(factor_tag)::type;
      scale_kernel<<<grid_for(elements), kThreads, 0, context.stream>>>(
          elements, s.rank, static_cast<const Acc*>(code), static_cast<const Factor*>(coeff),
          static_cast<Out*>(scaled));
    });
  });
  check_launch("lora_scale");
}

void lora_coeff_grad(const CudaContext& context, const LoraShape& s, const void* code, const void* grad_code,
                     int64_t blocks, void* partial, void* grad_coeff) {
  const int64_t rows_per_block = (s.num_tokens + blocks - 1) / blocks;
  dispatch_acc(accumulate_type(s.activation), [&](auto acc_tag) {
    dispatch(s.factor, [&](auto factor_tag) {
      using Acc = typename decltype(acc_tag)::type;
      using Factor = typename decltype(factor_tag)::type;
      coeff_partial_kernel<<<static_cast<unsigned>(blocks), kThreads, 0, context.stream>>>(
          s.num_tokens, s.rank, rows_per_block, static_cast<const Acc*>(code),
          static_cast<const Acc*>(grad_code), static_cast<Acc*>(partial));
      coeff_final_kernel<<<static_cast<unsigned>((s.rank + kThreads - 1) / kThreads), kThreads, 0,
                           context.stream>>>(s.rank, blocks, static_cast<const Acc*>(partial),
                                             static_cast<Factor*>(grad_coeff));
    });
  });
  check_launch("lora_coeff_grad");
}

void lora_unpack_gradients(const CudaContext& context, const LoraShape& s, const void* sum_a,
                           const void* sum_b, const void* coeff, void* grad_a, void* grad_b) {
  const int64_t size_a = s.rank * s.in_features, size_b = s.out_features * s.rank;
  dispatch_acc(accumulate_type(s.activation), [&](auto acc_tag) {
    dispatch(s.factor, [&](auto factor_tag) {
      using Acc = typename decltype(acc_tag)::type;
      using Factor = typename decltype(factor_tag)::type;
      unpack_kernel<<<grid_for(size_a + size_b), kThreads, 0, context.stream>>>(
          size_a, size_b, s.in_features, s.rank, static_cast<const Acc*>(sum_a),
          static_cast<const Acc*>(sum_b), static_cast<const Factor*>(coeff), static_cast<Factor*>(grad_a),
          static_cast<Factor*>(grad_b));
    });
  });
  check_launch("lora_unpack_gradients");
}

}  // namespace alore::kernels
