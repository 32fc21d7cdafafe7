// The mixing over blocks, H[t,b,e,:] = sum_a scale[e,a,b] Z[t,a,e,:]: one thread an output element, reads
// coalesced along the code's width.
#pragma once

#include "kernels/cuda_common.cuh"
#include "kernels/plan.h"

namespace alore::kernels {

template <typename Acc, typename Out>
__global__ void kron_mix_kernel(int64_t tokens, int s_in, int s_out, int width, int rank,
                                const Acc* __restrict__ scale,  // [num_experts, s_in, s_out]
                                const Acc* __restrict__ code,   // [tokens, s_in, width]
                                Out* __restrict__ mixed) {      // [tokens, s_out, width]
  const int64_t total = tokens * s_out * width;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < total;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int w = static_cast<int>(i % width);
    const int b = static_cast<int>(i / width % s_out);
    const int64_t t = i / (int64_t{width} * s_out);
    const Acc* s = scale + int64_t{w / rank} * s_in * s_out + b;
    const Acc* z = code + t * s_in * width + w;
    Acc sum = 0;
    for (int a = 0; a < s_in; ++a) sum += s[a * s_out] * z[int64_t{a} * width];
    mixed[i] = convert<Out>(sum);
  }
}

// mixed (activation type) from code (accumulate type). Overwrites mixed.
inline void kron_mix(const CudaContext& context, const KronShape& s, int64_t tokens, const void* scale,
                     const void* code, void* mixed) {
  dispatch(s.activation, [&](auto tag) {
    using Out = typename decltype(tag)::type;
    using Acc = acc_t<Out>;
    kron_mix_kernel<<<grid_for(tokens * s.s_out * s.width()), kThreads, 0, context.stream>>>(
        tokens, static_cast<int>(s.s_in), static_cast<int>(s.s_out), static_cast<int>(s.width()),
        static_cast<int>(s.rank), static_cast<const Acc*>(scale), static_cast<const Acc*>(code),
        static_cast<Out*>(mixed));
  });
  check_launch("kron_mix");
}

}  // namespace alore::kernels
