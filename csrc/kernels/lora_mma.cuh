// Fragments of the fused low-rank kernels.
//
// A warp takes 16 tokens by a chunk of 32 features. Lane (g, q) = (lane / 4, lane % 4) loads 16 bytes,
// features 8q to 8q+7 of the chunk, of token g and of token g + 8. A sum over features may take them in any
// order, so those very registers are operands of mma.m16n8k16 with its k axis permuted, with no trip through
// shared memory: register i holds columns 2q and 2q+1 of an 8x8 matrix M_i whose column c is feature
// feature_of(c, i) of the chunk. movmatrix turns M_i where tokens are summed over instead.
#pragma once

#include "kernels/cuda_common.cuh"
#include "kernels/lora.h"
#include "kernels/lora_layout.h"
#include "kernels/philox.h"
#include "kernels/rank_scale.cuh"
#include "kernels/tensor_core.cuh"

namespace alore::kernels {

struct Lane {
  int g, q;
  __device__ __forceinline__ explicit Lane(int lane) : g(lane >> 2), q(lane & 3) {}
};

// Feature, within its chunk, of column c of register i's matrix.
__host__ __device__ constexpr int feature_of(int c, int i) { return (c >> 1) * 8 + 2 * i + (c & 1); }

// Value k of the 16 bytes that a lane holds of a packed factor's tile: its rank row, of 8, and its feature,
// of the chunk. The order "reduce" multiplies a chunk by the factor, "expand" a code.
struct FactorPlace {
  int row, feature;

  __device__ __forceinline__ FactorPlace(bool expands, int lane, int k) {
    const Lane at(lane);
    row = expands ? 2 * at.q + (k & 1) : at.g;
    feature = expands ? feature_of(at.g, k >> 1) : at.q * 8 + k;
  }
};

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  const T a = convert<T>(low), b = convert<T>(high);
  uint16_t bits[2];
  memcpy(&bits[0], &a, 2);
  memcpy(&bits[1], &b, 2);
  return bits[0] | static_cast<uint32_t>(bits[1]) << 16;
}

template <typename T>
__device__ __forceinline__ void unpack_pair(uint32_t v, float& low, float& high) {
  const uint16_t bits[2] = {static_cast<uint16_t>(v), static_cast<uint16_t>(v >> 16)};
  T a, b;
  memcpy(&a, &bits[0], 2);
  memcpy(&b, &bits[1], 2);
  low = convert<float>(a);
  high = convert<float>(b);
}

template <typename T>
__device__ __forceinline__ uint4 rounded_eight(const float (&v)[8]) {
  return {pack_pair<T>(v[0], v[1]), pack_pair<T>(v[2], v[3]), pack_pair<T>(v[4], v[5]),
          pack_pair<T>(v[6], v[7])};
}

// sum[tile] += tokens x features times features x rank: `low` and `high` are a lane's loads of tokens g and
// g + 8, f[tile] its packed factor (lora_pack, the order "reduce").
template <typename T, int kTiles>
__device__ __forceinline__ void reduce_chunk(float (&sum)[kTiles][4], const uint4& low, const uint4& high,
                                             const uint4* f) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    mma<T>(sum[tile], low.x, high.x, low.y, high.y, f[tile].x, f[tile].y);
    mma<T>(sum[tile], low.z, high.z, low.w, high.w, f[tile].z, f[tile].w);
  }
}

// A code of 16 tokens by 8 * kTiles rank rows in the activation type: pairs of columns 2q, 2q+1 of each tile.
template <int kTiles>
struct CodePair {
  uint32_t low[kTiles], high[kTiles];  // tokens g and g + 8
};

// v[0..3][0..3] += code times rank x features: afterwards v[i] holds features 8q + 2i, 8q + 2i + 1 of token g
// (v[i][0], v[i][1]) and of token g + 8. e[tile] is the lane's packed factor, the order "expand".
template <typename T, int kTiles>
__device__ __forceinline__ void expand_chunk(float (&v)[4][4], const CodePair<kTiles>& code, const uint4* e) {
  static_assert(kTiles == 1 || kTiles % 2 == 0);
#pragma unroll
  for (int tile = 0; tile < kTiles; tile += 2) {  // two of them are one product's k axis
    const uint32_t first[4] = {e[tile].x, e[tile].y, e[tile].z, e[tile].w};
    if constexpr (kTiles == 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) mma<T>(v[i], code.low[0], code.high[0], 0u, 0u, first[i], 0u);
    } else {
      const uint32_t second[4] = {e[tile + 1].x, e[tile + 1].y, e[tile + 1].z, e[tile + 1].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        mma<T>(v[i], code.low[tile], code.high[tile], code.low[tile + 1], code.high[tile + 1], first[i],
               second[i]);
      }
    }
  }
}

template <typename T>
__device__ __forceinline__ uint4 rounded_row(const float (&v)[4][4], int half) {
  return {pack_pair<T>(v[0][2 * half], v[0][2 * half + 1]), pack_pair<T>(v[1][2 * half], v[1][2 * half + 1]),
          pack_pair<T>(v[2][2 * half], v[2][2 * half + 1]), pack_pair<T>(v[3][2 * half], v[3][2 * half + 1])};
}

// The packed factors: [chunks of in][tile][32 lanes] of A to reduce x, the same of A to expand a code of
// grad_out, then B to reduce grad_out and B to expand the code of x; one uint4 a lane.
template <int kTiles>
struct PackedFactors {
  const uint4 *reduce_a, *expand_a, *reduce_b, *expand_b;

  __host__ __device__ PackedFactors(const void* packed, int64_t in_features, int64_t out_features) {
    const int64_t a = lora_chunks(in_features) * kTiles * 32, b = lora_chunks(out_features) * kTiles * 32;
    reduce_a = static_cast<const uint4*>(packed);
    expand_a = reduce_a + a;
    reduce_b = expand_a + a;
    expand_b = reduce_b + b;
  }
};

template <int kTiles>
__device__ __forceinline__ void load_factor(const uint4* packed, int64_t chunk, int lane,
                                            uint4 (&out)[kTiles]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) out[tile] = __ldg(packed + (chunk * kTiles + tile) * 32 + lane);
}

// The kernels of lora_fused_backward, whose arguments these are: one that leaves partial sums (needs the
// staged plan), and the last.
void lora_backward_staged(const CudaContext& context, const LoraShape& shape, const LoraPlan& plan,
                          const RankScale& scale, const void* packed, const void* x, const void* grad_out,
                          const void* code, void* dx, void* workspace);
// Its half that does not read x: leaves grad_code = grad_out (b c), masked columns 0, [num_tokens, 8], and
// partial sums of grad_out^T code alone.
void lora_output_backward(const CudaContext& context, const LoraShape& shape, const LoraPlan& plan,
                          const RankScale& scale, const void* packed, const void* grad_out, const void* code,
                          void* grad_code, bool overlaps_launches, void* workspace);
void lora_finish(const CudaContext& context, const LoraShape& shape, const LoraPlan& plan, Factors2 factors,
                 const RankScale& scale, LoraGradients gradients, void* workspace);

// Calls f(Tag<T>, rank tiles) for a shape that lora_packs.
template <typename F>
void dispatch_fused(const LoraShape& s, F&& f) {
  const auto with_type = [&](auto tag) {
    if (s.rank <= 8) {
      f(tag, std::integral_constant<int, 1>{});
    } else {
      f(tag, std::integral_constant<int, 2>{});
    }
  };
  if (!lora_packs(s)) throw std::runtime_error("fused low-rank kernels: unsuited shape or dtype");
  s.activation == DType::kFloat16 ? with_type(Tag<__half>{}) : with_type(Tag<__nv_bfloat16>{});
}

}  // namespace alore::kernels
