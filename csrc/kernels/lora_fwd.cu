// The code t = x A^T in one pass over x, and with it either the base product's longer operand [x | t], or
// y0 = bias + (t * c) B^T, onto which the base product accumulates: reading it hides behind the arithmetic.
#include "kernels/lora_mma.cuh"

namespace alore::kernels {
namespace {

// A block takes 16 tokens. Its warps share the features of x, meet once over their partial codes, and share
// the features of y.
template <typename T, int kTiles>
__global__ void __launch_bounds__(kForwardWarps * 32, kTiles == 1 ? 4 : 3)
    lora_forward_kernel(int64_t num_tokens, int64_t in_features, int64_t out_features,
                        const T* __restrict__ x, PackedFactors<kTiles> factors, RankScale scale,
                        const T* __restrict__ bias, T* __restrict__ code, T* __restrict__ y,
                        T* __restrict__ extended) {
  constexpr int kWidth = 8 * kTiles;
  constexpr int kBatch = 3;  // chunks in flight: 6 loads of 16 bytes a lane
  __shared__ float4 partial[kForwardWarps][kTiles][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto [g, q] = Lane(lane);
  const int64_t row_low = blockIdx.x * kTileTokens + g, row_high = row_low + 8;
  const bool has_low = row_low < num_tokens, has_high = row_high < num_tokens;
  const uint4 zero = {0u, 0u, 0u, 0u};
  const int64_t stride = in_features + kWidth;  // of extended

  float sum[kTiles][4] = {};
  const int64_t chunks = lora_chunks(in_features);
  for (int64_t first = warp; first < chunks; first += kBatch * kForwardWarps) {
    uint4 low[kBatch], high[kBatch], f[kBatch][kTiles];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int64_t chunk = first + k * kForwardWarps, column = chunk * kChunk + q * 8;
      const bool inside = column < in_features;
      low[k] = inside && has_low ? __ldcg(reinterpret_cast<const uint4*>(x + row_low * in_features + column))
                                 : zero;
      high[k] = inside && has_high
                    ? __ldcg(reinterpret_cast<const uint4*>(x + row_high * in_features + column))
                    : zero;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) f[k][tile] = zero;
      if (chunk < chunks) load_factor<kTiles>(factors.reduce_a, chunk, lane, f[k]);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      reduce_chunk<T, kTiles>(sum, low[k], high[k], f[k]);
      const int64_t column = (first + k * kForwardWarps) * kChunk + q * 8;
      if (extended == nullptr || column >= in_features) continue;
      if (has_low) *reinterpret_cast<uint4*>(extended + row_low * stride + column) = low[k];
      if (has_high) *reinterpret_cast<uint4*>(extended + row_high * stride + column) = high[k];
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    partial[warp][tile][lane] = {sum[tile][0], sum[tile][1], sum[tile][2], sum[tile][3]};
  }
  __syncthreads();

  CodePair<kTiles> kept;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    float4 total = partial[0][tile][lane];
#pragma unroll
    for (int w = 1; w < kForwardWarps; ++w) {
      const float4 part = partial[w][tile][lane];
      total.x += part.x;
      total.y += part.y;
      total.z += part.z;
      total.w += part.w;
    }
    // Backward needs the code of masked experts too; the padded columns stay 0 even where x is not finite.
    const int j = tile * 8 + 2 * q;
    if (j >= scale.rank) total.x = total.z = 0.0f;
    if (j + 1 >= scale.rank) total.y = total.w = 0.0f;
    kept.low[tile] = pack_pair<T>(total.x, total.y);
    kept.high[tile] = pack_pair<T>(total.z, total.w);
    if (warp == 0) {
      if (has_low) *reinterpret_cast<uint32_t*>(code + row_low * kWidth + j) = kept.low[tile];
      if (has_high) *reinterpret_cast<uint32_t*>(code + row_high * kWidth + j) = kept.high[tile];
    }
    // c itself is inside the packed B; a masked column must not pass on what is not finite.
    const uint32_t keep =
        (scale.at<T>(j) != 0.0f ? 0x0000ffffu : 0u) | (scale.at<T>(j + 1) != 0.0f ? 0xffff0000u : 0u);
    kept.low[tile] &= keep;
    kept.high[tile] &= keep;
    if (extended != nullptr && warp == 0) {
      T* at = extended + row_low * stride + in_features + j;
      if (has_low) *reinterpret_cast<uint32_t*>(at) = kept.low[tile];
      if (has_high) *reinterpret_cast<uint32_t*>(at + 8 * stride) = kept.high[tile];
    }
  }
  if (y == nullptr) return;

  for (int64_t chunk = warp; chunk < lora_chunks(out_features); chunk += kForwardWarps) {
    const int64_t column = chunk * kChunk + q * 8;
    const bool inside = column < out_features;
    uint4 e[kTiles];
    load_factor<kTiles>(factors.expand_b, chunk, lane, e);
    float v[4][4] = {};
    if (bias != nullptr && inside) {
      const uint4 bits = __ldg(reinterpret_cast<const uint4*>(bias + column));
      const uint32_t pairs[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        unpack_pair<T>(pairs[i], v[i][0], v[i][1]);
        v[i][2] = v[i][0];
        v[i][3] = v[i][1];
      }
    }
    expand_chunk<T, kTiles>(v, kept, e);
    if (inside && has_low)
      *reinterpret_cast<uint4*>(y + row_low * out_features + column) = rounded_row<T>(v, 0);
    if (inside && has_high)
      *reinterpret_cast<uint4*>(y + row_high * out_features + column) = rounded_row<T>(v, 1);
  }
}

}  // namespace

void lora_fused_forward(const CudaContext& context, const LoraShape& s, const Coefficients& coefficients,
                        const void* packed, const void* x, const void* bias, void* code, void* y,
                        void* extended) {
  if (s.num_tokens == 0) return;
  const auto tiles = static_cast<unsigned>((s.num_tokens + kTileTokens - 1) / kTileTokens);
  const auto launch = [&](auto tag, auto rank_tiles) {
    using T = typename decltype(tag)::type;
    constexpr int kTiles = decltype(rank_tiles)::value;
    lora_forward_kernel<T, kTiles><<<tiles, kForwardWarps * 32, 0, context.stream>>>(
        s.num_tokens, s.in_features, s.out_features, static_cast<const T*>(x),
        PackedFactors<kTiles>(packed, s.in_features, s.out_features), rank_scale(s, coefficients),
        static_cast<const T*>(bias), static_cast<T*>(code), static_cast<T*>(y), static_cast<T*>(extended));
  };
  dispatch_fused(s, launch);
  check_launch("lora_fused_forward");
}

}  // namespace alore::kernels
