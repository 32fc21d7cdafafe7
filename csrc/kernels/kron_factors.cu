// Small launches around the GEMMs: factors in, gradients out. A few thousand elements each.
#include "kernels/cuda_common.cuh"
#include "kernels/kron.h"

namespace alore::kernels {
namespace {

struct FactorSizes {
  int64_t scale, down, up;
  int64_t num_experts, p_in, rank;

  // [num_experts, p_in, rank] -> [p_in, num_experts * rank]
  __device__ int64_t packed_down(int64_t i) const {
    const int64_t k = i % rank, row = i / rank % p_in, e = i / (rank * p_in);
    return (row * num_experts + e) * rank + k;
  }
};

FactorSizes sizes_of(const KronShape& s) {
  return {s.scale_size(), s.down_size(), s.up_size(), s.num_experts, s.p_in, s.rank};
}

template <typename Factor, typename Compute, typename Acc>
__global__ void pack_kernel(FactorSizes n, const Factor* scale, const Factor* down, const Factor* up,
                            Acc* scale_out, Compute* down_out, Compute* up_out) {
  const int64_t total = n.scale + n.down + n.up;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < total;
       i += int64_t{gridDim.x} * blockDim.x) {
    if (i < n.scale) {
      scale_out[i] = convert<Acc>(scale[i]);
    } else if (i < n.scale + n.down) {
      const int64_t j = i - n.scale;
      down_out[n.packed_down(j)] = convert<Compute>(down[j]);
    } else {
      const int64_t j = i - n.scale - n.down;
      up_out[j] = convert<Compute>(up[j]);
    }
  }
}

template <typename Factor, typename Acc>
__global__ void unpack_kernel(FactorSizes n, int64_t blocks, const Acc* scale_partial, const Acc* down,
                              const Acc* up, Factor* scale_out, Factor* down_out, Factor* up_out) {
  const int64_t total = n.scale + n.down + n.up;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < total;
       i += int64_t{gridDim.x} * blockDim.x) {
    if (i < n.scale) {
      Acc sum = 0;
      for (int64_t b = 0; b < blocks; ++b) sum += scale_partial[b * n.scale + i];
      scale_out[i] = convert<Factor>(sum);
    } else if (i < n.scale + n.down) {
      const int64_t j = i - n.scale;
      down_out[j] = convert<Factor>(down[n.packed_down(j)]);
    } else {
      const int64_t j = i - n.scale - n.down;
      up_out[j] = convert<Factor>(up[j]);
    }
  }
}

}  // namespace

void kron_pack_factors(const CudaContext& context, const KronShape& shape, const KronFactors& factors,
                       void* scale, void* down, void* up) {
  const FactorSizes n = sizes_of(shape);
  dispatch(shape.factor, [&](auto factor_tag) {
    dispatch(shape.activation, [&](auto compute_tag) {
      using Factor = typename decltype(factor_tag)::type;
      using Compute = typename decltype(compute_tag)::type;
      using Acc = acc_t<Compute>;
      pack_kernel<Factor, Compute, Acc><<<grid_for(n.scale + n.down + n.up), kThreads, 0, context.stream>>>(
          n, static_cast<const Factor*>(factors.scale), static_cast<const Factor*>(factors.down),
          static_cast<const Factor*>(factors.up), static_cast<Acc*>(scale), static_cast<Compute*>(down),
          static_cast<Compute*>(up));
    });
  });
  check_launch("kron_pack_factors");
}

void kron_unpack_gradients(const CudaContext& context, const KronShape& shape, int64_t blocks,
                           const void* scale_partial, const void* down, const void* up,
                           const KronGradients& grads) {
  const FactorSizes n = sizes_of(shape);
  dispatch(shape.factor, [&](auto factor_tag) {
    dispatch_acc(accumulate_type(shape.activation), [&](auto acc_tag) {
      using Factor = typename decltype(factor_tag)::type;
      using Acc = typename decltype(acc_tag)::type;
      unpack_kernel<Factor, Acc><<<grid_for(n.scale + n.down + n.up), kThreads, 0, context.stream>>>(
          n, blocks, static_cast<const Acc*>(scale_partial), static_cast<const Acc*>(down),
          static_cast<const Acc*>(up), static_cast<Factor*>(grads.scale), static_cast<Factor*>(grads.down),
          static_cast<Factor*>(grads.up));
    });
  });
  check_launch("kron_unpack_gradients");
}

}  // namespace alore::kernels
