// Adding up the partial sums that the low-rank backward leaves, into the gradients of the factors and
// coefficients.
#pragma once

#include "kernels/lora_mma.cuh"

namespace alore::kernels {

struct FinishArgs {
  int64_t in_features, out_features, blocks;
  int64_t units_y, units_x;
  bool in_order;  // a unit's features are g and g + 8; else feature_of's
  RankScale scale;
  const float4 *partial_y, *partial_x;
  float* coeff_parts;  // [units_y / tiles, 8 * tiles]
  unsigned* counter;

  // Without units_x where nobody asks for the gradient of A here.
  FinishArgs(const LoraShape& s, const LoraPlan& plan, const RankScale& scale, bool wants_a, void* workspace)
      : in_features(s.in_features),
        out_features(s.out_features),
        blocks(plan.blocks),
        in_order(plan.backward == LoraPath::kStaged),
        scale(scale) {
    const LoraWorkspace layout(s, plan.blocks);
    char* const base = static_cast<char*>(workspace);
    units_y = layout.units_y;
    units_x = wants_a ? layout.units_x : 0;
    partial_y = reinterpret_cast<const float4*>(base + layout.partial_y);
    partial_x = reinterpret_cast<const float4*>(base + layout.partial_x);
    coeff_parts = reinterpret_cast<float*>(base + layout.coeff);
    counter = reinterpret_cast<unsigned*>(base + layout.counter);
  }
  int units() const { return static_cast<int>(units_y + units_x); }
};

// Unit `block` of args.units(), by a block of 32 * kWarps threads: its warps share the partial sums, warp 0
// adds theirs up and writes the gradients. The last block to come in sums the coefficients' parts; what it
// adds, and in which order, does not depend on which block that is.
template <typename T, typename Factor, int kTiles, int kWarps>
__device__ __forceinline__ void finish_unit(const FinishArgs& args, int block, const Factor* __restrict__ b,
                                            Factor* __restrict__ grad_a, Factor* __restrict__ grad_b,
                                            Factor* __restrict__ grad_coeff) {
  constexpr int kWidth = 8 * kTiles;
  __shared__ float4 sums[kWarps][32];
  __shared__ bool last;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto [g, q] = Lane(lane);
  const bool from_y = block < args.units_y;
  const int unit = static_cast<int>(from_y ? block : block - args.units_y);
  const int64_t stride = (from_y ? args.units_y : args.units_x) * 32;
  const float4* source = (from_y ? args.partial_y : args.partial_x) + unit * 32 + lane;

  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
  for (int64_t i = warp; i < args.blocks; i += kWarps) {
    const float4 part = source[i * stride];
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0) {
    for (int w = 1; w < kWarps; ++w) {
      const float4 part = sums[w][lane];
      sum.x += part.x;
      sum.y += part.y;
      sum.z += part.z;
      sum.w += part.w;
    }
    const int tile = unit % kTiles, half = unit / kTiles % 2;
    const int64_t first = int64_t{unit / (2 * kTiles)} * kChunk;
    const int rank = args.scale.rank;
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
    float dot[2] = {0.0f, 0.0f};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int j = tile * 8 + 2 * q + (k & 1);
      const int64_t feature =
          first + (args.in_order ? half * 16 + g + (k >> 1) * 8 : feature_of(g, 2 * half + (k >> 1)));
      if (j >= rank || feature >= (from_y ? args.out_features : args.in_features)) continue;
      const float c = args.scale.template at<T>(j);
      if (from_y) {
        grad_b[feature * rank + j] = convert<Factor>(c == 0.0f ? 0.0f : c * values[k]);
        dot[k & 1] += convert<float>(b[feature * rank + j]) * values[k];
      } else {
        grad_a[j * args.in_features + feature] = convert<Factor>(c == 0.0f ? 0.0f : values[k]);
      }
    }
    if (from_y) {
#pragma unroll
      for (int offset = 4; offset < 32; offset <<= 1) {
        dot[0] += __shfl_xor_sync(0xffffffffu, dot[0], offset);
        dot[1] += __shfl_xor_sync(0xffffffffu, dot[1], offset);
      }
      if (g == 0) {
        float* parts = args.coeff_parts + unit / kTiles * kWidth + tile * 8 + 2 * q;
        parts[0] = dot[0];
        parts[1] = dot[1];
      }
    }
  }

  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0)
    last = atomicAdd(args.counter, 1u) == static_cast<unsigned>(args.units_y + args.units_x) - 1;
  __syncthreads();
  if (!last) return;
  __threadfence();
  float* const flat = reinterpret_cast<float*>(sums);  // [slices, width]
  constexpr int kSlices = 32 * kWarps / kWidth;
  const int j = threadIdx.x % kWidth, slice = threadIdx.x / kWidth;
  float total = 0.0f;
  for (int64_t row = slice; row < args.units_y / kTiles; row += kSlices) {
    total += __ldcg(args.coeff_parts + row * kWidth + j);
  }
  flat[slice * kWidth + j] = total;
  __syncthreads();
  const int experts = args.scale.rank / args.scale.expert_rank;
  if (static_cast<int>(threadIdx.x) >= experts) return;
  const int e = threadIdx.x;
  float grad = 0.0f;
  for (int row = e * args.scale.expert_rank; row < (e + 1) * args.scale.expert_rank; ++row) {
    for (int s = 0; s < kSlices; ++s) grad += flat[s * kWidth + row];
  }
  if (args.scale.mask != nullptr) {
    const float m = static_cast<const float*>(args.scale.mask)[e];
    grad = m == 0.0f ? 0.0f : grad * m;
  }
  grad_coeff[e] = convert<Factor>(grad);
}

}  // namespace alore::kernels
