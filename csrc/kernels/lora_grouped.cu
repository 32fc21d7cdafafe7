// y0 of the grouped low-rank linear: every adapter's factors are packed for the tensor cores, then one pass
// reads x and writes y0, 16 tokens of one sample to a block.
#include <cstdio>

#include "kernels/lora_grouped.h"
#include "kernels/lora_mma.cuh"

namespace alore::kernels {
namespace {

constexpr int kPackThreads = 256;
constexpr int kPackEntries = 96;  // adapters of a launch that packs

struct PackEntry {
  LoraAdapter factors;
  PackedAdapter place;
  int32_t rank;
  bool wide;  // factors are float32; otherwise they have the activation type
};

struct PackParams {
  int32_t in_features, out_features;
  PackedAdapter* directory;  // of the table's first entry
  uint4* packed;             // of the first adapter of all
  PackEntry table[kPackEntries];
};

// What must fit CUDA's least limit on kernel parameters.
static_assert(sizeof(PackParams) <= 4096);

template <typename T>
__device__ __forceinline__ float factor_at(const PackEntry& e, const void* data, int64_t i) {
  return e.wide ? static_cast<const float*>(data)[i] : convert<float>(static_cast<const T*>(data)[i]);
}

// A thread packs 16 bytes of the adapter blockIdx.y: A in the order "reduce", then B, with its coefficients,
// in the order "expand". Rows of padding and rows whose coefficient is 0 are 0 in both.
template <typename T>
__global__ void __launch_bounds__(kPackThreads, 4)
    lora_grouped_pack_kernel(const __grid_constant__ PackParams p) {
  const PackEntry& e = p.table[blockIdx.y];
  const int tiles = e.place.tiles;
  const int64_t size_a = lora_chunks(p.in_features) * tiles * 32,
                size = size_a + lora_chunks(p.out_features) * tiles * 32;
  const int64_t index = blockIdx.x * int64_t{kPackThreads} + threadIdx.x;
  if (index == 0) p.directory[blockIdx.y] = e.place;
  if (index >= size) return;
  const bool expands = index >= size_a;
  const int64_t within = expands ? index - size_a : index, chunk = within / (32 * tiles);
  const int features = expands ? p.out_features : p.in_features;
  float v[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const FactorPlace place(expands, static_cast<int>(within % 32), k);
    const int j = static_cast<int>(within / 32 % tiles) * 8 + place.row;
    const int64_t feature = chunk * kChunk + place.feature;
    v[k] = 0.0f;
    if (j >= e.rank || feature >= features) continue;
    const float c = factor_at<T>(e, e.factors.coeff, j);
    if (c == 0.0f) continue;
    v[k] = expands ? c * factor_at<T>(e, e.factors.b, feature * e.rank + j)
                   : factor_at<T>(e, e.factors.a, j * int64_t{p.in_features} + feature);
  }
  p.packed[e.place.first + index] = rounded_eight<T>(v);
}

template <typename T>
struct GroupedParams {
  int64_t tokens;             // of a sample
  uint32_t tiles_per_sample;  // 32 bits: a 64-bit division is a hundred instructions
  int32_t in_features, out_features;
  int64_t num_adapters;
  const T *x, *bias;
  const int64_t* index;
  const PackedAdapter* directory;
  const uint4* packed;
  T* y;
};

// The rows of x or y that a lane has: tokens g and g + 8 of its block's tile, where the sample has them.
struct TileRows {
  int64_t low;  // of all tokens
  bool has_low, has_high;
};

// A chunk's packed factor of all tiles, 0 beyond the adapter's own.
template <int kTiles>
__device__ __forceinline__ void load_tiles(const uint4* packed, int chunk, int tiles, int lane,
                                           uint4 (&out)[kTiles]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    out[tile] = {0u, 0u, 0u, 0u};
    if (tile < tiles) out[tile] = __ldg(packed + (chunk * tiles + tile) * 32 + lane);
  }
}

// The tile's code, x A^T, rounded as the next product's operand. The block's warps share the features of x
// and meet over their partial sums.
template <typename T, int kTiles>
__device__ __forceinline__ CodePair<kTiles> encode(const GroupedParams<T>& p, const uint4* factor, int tiles,
                                                   const TileRows& rows, int warp, int lane) {
  constexpr int kBatch = kTiles <= 4 ? 3 : 2;  // chunks in flight: 6 loads of 16 bytes a lane, or 4
  constexpr bool kEarly = kTiles == 1;         // their factors too, where registers hold them
  __shared__ float4 partial[kForwardWarps][kTiles][32];
  const int chunks = static_cast<int>(lora_chunks(p.in_features)), q = lane % 4;
  const T* low_row = p.x + rows.low * p.in_features;
  const T* high_row = low_row + int64_t{8} * p.in_features;
  float sum[kTiles][4] = {};
#pragma unroll 1
  for (int first = warp; first < chunks; first += kBatch * kForwardWarps) {
    uint4 low[kBatch], high[kBatch], f[kEarly ? kBatch : 1][kTiles];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int chunk = first + k * kForwardWarps;
      const int column = chunk * static_cast<int>(kChunk) + q * 8;
      const bool inside = column < p.in_features;
      low[k] = high[k] = {0u, 0u, 0u, 0u};
      if (inside && rows.has_low) low[k] = __ldcg(reinterpret_cast<const uint4*>(low_row + column));
      if (inside && rows.has_high) high[k] = __ldcg(reinterpret_cast<const uint4*>(high_row + column));
      if constexpr (kEarly) load_tiles<kTiles>(factor, chunk, chunk < chunks ? tiles : 0, lane, f[k]);
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int chunk = first + k * kForwardWarps;
      if constexpr (!kEarly) load_tiles<kTiles>(factor, chunk, chunk < chunks ? tiles : 0, lane, f[0]);
      reduce_chunk<T, kTiles>(sum, low[k], high[k], f[kEarly ? k : 0]);
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    partial[warp][tile][lane] = {sum[tile][0], sum[tile][1], sum[tile][2], sum[tile][3]};
  }
  __syncthreads();
  CodePair<kTiles> code;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    float4 total = partial[0][tile][lane];
#pragma unroll
    for (int w = 1; w < kForwardWarps; ++w) {
      const float4 part = partial[w][tile][lane];
      total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
    }
    code.low[tile] = pack_pair<T>(total.x, total.y);
    code.high[tile] = pack_pair<T>(total.z, total.w);
  }
  return code;
}

// y0 = bias + code B^T. The warps share the features of y. Without an adapter `tiles` is 0.
template <typename T, int kTiles>
__device__ __forceinline__ void expand(const GroupedParams<T>& p, const uint4* factor, int tiles,
                                       const CodePair<kTiles>& code, const TileRows& rows, int warp,
                                       int lane) {
  constexpr int kBatch = kTiles == 1 ? 3 : kTiles == 2 ? 2 : 1;  // chunks whose factors are in flight
  const int chunks = static_cast<int>(lora_chunks(p.out_features)), q = lane % 4;
  T* low_row = p.y + rows.low * p.out_features;
  T* high_row = low_row + int64_t{8} * p.out_features;
#pragma unroll 1
  for (int first = warp; first < chunks; first += kBatch * kForwardWarps) {
    uint4 f[kBatch][kTiles], bias[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int chunk = first + k * kForwardWarps;
      const int column = chunk * static_cast<int>(kChunk) + q * 8;
      load_tiles<kTiles>(factor, chunk, chunk < chunks ? tiles : 0, lane, f[k]);
      bias[k] = {0u, 0u, 0u, 0u};
      if (p.bias != nullptr && column < p.out_features) {
        bias[k] = __ldg(reinterpret_cast<const uint4*>(p.bias + column));
      }
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int column = (first + k * kForwardWarps) * static_cast<int>(kChunk) + q * 8;
      const uint32_t pairs[4] = {bias[k].x, bias[k].y, bias[k].z, bias[k].w};
      float v[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        unpack_pair<T>(pairs[i], v[i][0], v[i][1]);
        v[i][2] = v[i][0];
        v[i][3] = v[i][1];
      }
      expand_chunk<T, kTiles>(v, code, f[k]);
      if (column < p.out_features) {
        if (rows.has_low) store_16(low_row + column, rounded_row<T>(v, 0));
        if (rows.has_high) store_16(high_row + column, rounded_row<T>(v, 1));
      }
    }
  }
}

template <typename T, int kTiles>
__global__ void __launch_bounds__(kForwardWarps * 32, kTiles == 1   ? 4
                                                      : kTiles == 2 ? 3
                                                                    : 2)
    lora_grouped_kernel(const __grid_constant__ GroupedParams<T> p) {
  const uint32_t sample = blockIdx.x / p.tiles_per_sample, tile = blockIdx.x - sample * p.tiles_per_sample;
  const int64_t which = p.index[sample];
  if (which < -1 || which >= p.num_adapters) {
    if (threadIdx.x == 0) {
      printf("alore_ext: index[%lld] = %lld is not in [-1, %lld)\n", static_cast<long long>(sample),
             static_cast<long long>(which), static_cast<long long>(p.num_adapters));
    }
    __trap();
  }
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t token = int64_t{tile} * kTileTokens + lane / 4;
  const TileRows rows{sample * p.tokens + token, token < p.tokens, token + 8 < p.tokens};
  PackedAdapter adapter{0, 0};
  CodePair<kTiles> code{};
  if (which >= 0) {
    adapter = p.directory[which];
    code = encode<T, kTiles>(p, p.packed + adapter.first, adapter.tiles, rows, warp, lane);
  }
  const uint4* factor = p.packed + adapter.first + lora_chunks(p.in_features) * adapter.tiles * 32;
  expand<T, kTiles>(p, factor, adapter.tiles, code, rows, warp, lane);
}

template <typename T>
void pack(const CudaContext& context, std::span<const LoraShape> shapes, const LoraGroupedArgs& args,
          PackedAdapter* directory, uint4* packed) {
  PackParams p{static_cast<int32_t>(shapes.front().in_features),
               static_cast<int32_t>(shapes.front().out_features),
               nullptr,
               packed,
               {}};
  int64_t first = 0;
  for (size_t from = 0; from < shapes.size(); from += kPackEntries) {
    const size_t count = std::min<size_t>(kPackEntries, shapes.size() - from);
    int64_t most = 0;
    for (size_t i = 0; i < count; ++i) {
      const LoraShape& s = shapes[from + i];
      p.table[i] = {args.adapters[from + i],
                    {static_cast<int32_t>(first), static_cast<int32_t>(round_up(s.rank, 8) / 8)},
                    static_cast<int32_t>(s.rank),
                    s.factor == DType::kFloat32};
      first += lora_grouped_vectors(s);
      most = std::max(most, lora_grouped_vectors(s));
    }
    p.directory = directory + from;
    const dim3 grid(static_cast<unsigned>((most + kPackThreads - 1) / kPackThreads),
                    static_cast<unsigned>(count));
    lora_grouped_pack_kernel<T><<<grid, kPackThreads, 0, context.stream>>>(p);
    check_launch("lora_grouped_forward");
  }
}

// Calls f with the least instantiated number of tiles that holds `tiles`.
template <typename F>
void dispatch_tiles(int tiles, F&& f) {
  if (tiles <= 1) return f(std::integral_constant<int, 1>{});
  if (tiles <= 2) return f(std::integral_constant<int, 2>{});
  if (tiles <= 4) return f(std::integral_constant<int, 4>{});
  static_assert(kMaxGroupedRank == 8 * 8);
  f(std::integral_constant<int, 8>{});
}

}  // namespace

void lora_grouped_forward(const CudaContext& context, int64_t num_samples, std::span<const LoraShape> shapes,
                          const LoraGroupedPlan& plan, const LoraGroupedArgs& args) {
  if (!plan.fused) throw std::runtime_error("lora_grouped_forward: no fused kernel for this shape");
  const LoraShape& s = shapes.front();
  if (s.num_tokens == 0) return;
  const auto num_adapters = static_cast<int64_t>(shapes.size());
  auto* directory = static_cast<PackedAdapter*>(args.workspace);
  auto* packed = reinterpret_cast<uint4*>(static_cast<unsigned char*>(args.workspace) +
                                          lora_grouped_directory_bytes(num_adapters));
  const auto run = [&](auto tag) {
    using T = typename decltype(tag)::type;
    pack<T>(context, shapes, args, directory, packed);
    const int64_t tokens = s.num_tokens / num_samples, tiles = (tokens + kTileTokens - 1) / kTileTokens;
    const GroupedParams<T> p{tokens,
                             static_cast<uint32_t>(tiles),
                             static_cast<int32_t>(s.in_features),
                             static_cast<int32_t>(s.out_features),
                             num_adapters,
                             static_cast<const T*>(args.x),
                             static_cast<const T*>(args.bias),
                             args.index,
                             directory,
                             packed,
                             static_cast<T*>(args.y)};
    dispatch_tiles(plan.rank_tiles, [&](auto rank_tiles) {
      lora_grouped_kernel<T, decltype(rank_tiles)::value>
          <<<static_cast<unsigned>(num_samples * tiles), kForwardWarps * 32, 0, context.stream>>>(p);
    });
    check_launch("lora_grouped_forward");
  };
  s.activation == DType::kFloat16 ? run(Tag<__half>{}) : run(Tag<__nv_bfloat16>{});
}

}  // namespace alore::kernels
