// The backward of the low-rank side for any widths, in one pass over grad_out and x; lora_finish.cu adds up
// what its blocks leave.
#include "kernels/async_copy.cuh"
#include "kernels/lora_mma.cuh"

namespace alore::kernels {
namespace {

template <typename T>
struct BackwardArgs {
  int64_t num_tokens, in_features, out_features;
  const T* grad_out;  // null: the kernel's second half alone, which reads grad_code
  const T* x;         // null: its first half alone, which writes grad_code
  const T* code;      // [num_tokens, width]
  T* grad_code;       // [num_tokens, width] or null: grad_out (B c)
  T* dx;              // [num_tokens, in_features] or null
  RankScale scale;
  float4 *partial_y, *partial_x;  // [blocks, units, 32]
  unsigned* counter;              // set to 0 for the kernel behind this one
};

// What one warp reads: its chunks of grad_out, then its chunks of x, tile after tile, kDepth - 1 ahead. Every
// lane copies what it will itself read, so no lane waits for another.
template <typename T, int kDepth>
class Stream {
 public:
  int count_y = 0, count_x = 0;  // chunks a tile of this warp

  __device__ Stream(const BackwardArgs<T>& args, uint4* ring, int64_t tiles, int warp, int lane)
      : args_(args), ring_(ring), tiles_(tiles), tile_(blockIdx.x), warp_(warp), lane_(lane) {
    if (args.grad_out != nullptr) count_y = share(lora_chunks(args.out_features));
    if (args.x != nullptr) count_x = share(lora_chunks(args.in_features));
    for (int k = 0; k < kDepth - 1; ++k) issue();
  }

  // Tokens g and g + 8 of the next chunk.
  __device__ __forceinline__ void next(uint4& low, uint4& high) {
    copy_async_wait<kDepth - 2>();
    low = ring_[read_ * 64 + lane_];
    high = ring_[read_ * 64 + 32 + lane_];
    read_ = read_ + 1 == kDepth ? 0 : read_ + 1;
    issue();  // into the slot that was read one call ago
  }

 private:
  __device__ int share(int64_t chunks) const {
    return static_cast<int>((chunks - warp_ + kBackwardWarps - 1) / kBackwardWarps);
  }

  __device__ __forceinline__ void issue() {
    if (tile_ < tiles_ && count_y + count_x > 0) {
      const bool from_y = position_ < count_y;
      const T* source = from_y ? args_.grad_out : args_.x;
      const int64_t width = from_y ? args_.out_features : args_.in_features;
      const int64_t chunk = warp_ + int64_t{kBackwardWarps} * (from_y ? position_ : position_ - count_y);
      const int64_t column = chunk * kChunk + (lane_ & 3) * 8, row = tile_ * kTileTokens + (lane_ >> 2);
      const bool inside = column < width;
      const bool low = inside && row < args_.num_tokens, high = inside && row + 8 < args_.num_tokens;
      uint4* slot = ring_ + write_ * 64 + lane_;
      copy_async_16(slot, low ? source + row * width + column : source, low);
      copy_async_16(slot + 32, high ? source + (row + 8) * width + column : source, high);
      if (++position_ == count_y + count_x) {
        position_ = 0;
        tile_ += gridDim.x;
      }
    }
    copy_async_commit();  // an empty group too, so that their number tells how far the copies are
    write_ = write_ + 1 == kDepth ? 0 : write_ + 1;
  }

  const BackwardArgs<T>& args_;
  uint4* ring_;
  int64_t tiles_, tile_;
  int warp_, lane_, position_ = 0, write_ = 0, read_ = 0;
};

// acc[half][tile] += features x tokens times tokens x rank; `turned_code` holds each tile's code turned.
template <typename T, int kTiles>
__device__ __forceinline__ void accumulate_chunk(float4* acc, const uint4& low, const uint4& high,
                                                 const CodePair<kTiles>& turned_code, int lane) {
  const uint32_t a[4] = {transpose8x8(low.x), transpose8x8(low.y), transpose8x8(low.z), transpose8x8(low.w)};
  const uint32_t b[4] = {transpose8x8(high.x), transpose8x8(high.y), transpose8x8(high.z),
                         transpose8x8(high.w)};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float4& kept = acc[(half * kTiles + tile) * 32 + lane];
      float sum[4] = {kept.x, kept.y, kept.z, kept.w};
      mma<T>(sum, a[2 * half], a[2 * half + 1], b[2 * half], b[2 * half + 1], turned_code.low[tile],
             turned_code.high[tile]);
      kept = {sum[0], sum[1], sum[2], sum[3]};
    }
  }
}

template <int kTiles>
__device__ __forceinline__ CodePair<kTiles> turned_pair(const CodePair<kTiles>& code) {
  CodePair<kTiles> out;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    out.low[tile] = transpose8x8(code.low[tile]);
    out.high[tile] = transpose8x8(code.high[tile]);
  }
  return out;
}

template <typename T, int kTiles>
__device__ __forceinline__ CodePair<kTiles> load_code(const T* code, int64_t row, int64_t num_tokens, int q) {
  CodePair<kTiles> out;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const T* at = code + row * (8 * kTiles) + tile * 8 + 2 * q;
    out.low[tile] = row < num_tokens ? __ldg(reinterpret_cast<const uint32_t*>(at)) : 0u;
    out.high[tile] = row + 8 < num_tokens ? __ldg(reinterpret_cast<const uint32_t*>(at + 64 * kTiles)) : 0u;
  }
  return out;
}

template <typename T, int kTiles>
__global__ void __launch_bounds__(kBackwardWarps * 32, 1)
    lora_backward_kernel(BackwardArgs<T> args, PackedFactors<kTiles> factors) {
  constexpr int kDepth = lora_depth(kTiles), kWidth = 8 * kTiles;
  extern __shared__ float4 shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto [g, q] = Lane(lane);
  const int64_t tiles = (args.num_tokens + kTileTokens - 1) / kTileTokens;
  const int64_t units_y = args.grad_out == nullptr ? 0 : lora_units(args.out_features, kTiles);
  const int64_t units_x = args.x == nullptr ? 0 : lora_units(args.in_features, kTiles);
  float4* const acc_y = shared;
  float4* const acc_x = acc_y + units_y * 32;
  float4* const rings = acc_x + units_x * 32;
  float4* const meeting = rings + kBackwardWarps * kDepth * 64;  // [2][warps][tile][lane]
  if (blockIdx.x == 0 && threadIdx.x == 0) *args.counter = 0u;

  Stream<T, kDepth> stream(args, reinterpret_cast<uint4*>(rings) + warp * kDepth * 64, tiles, warp, lane);

  // A chunk's sums belong to one warp, and each float4 of them to one lane: no barrier guards them.
  constexpr int kChunkUnits = 2 * kTiles;
  const auto clear = [&](float4* acc, int count) {
    for (int k = 0; k < count; ++k) {
      float4* chunk = acc + (warp + kBackwardWarps * k) * (kChunkUnits * 32) + lane;
#pragma unroll
      for (int unit = 0; unit < kChunkUnits; ++unit) chunk[unit * 32] = {0.0f, 0.0f, 0.0f, 0.0f};
    }
  };
  clear(acc_y, stream.count_y);
  clear(acc_x, stream.count_x);

  uint32_t keep[kTiles];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int j = tile * 8 + 2 * q;
    keep[tile] = (args.scale.template at<T>(j) != 0.0f ? 0x0000ffffu : 0u) |
                 (args.scale.template at<T>(j + 1) != 0.0f ? 0xffff0000u : 0u);
  }

  const T* given = args.grad_out != nullptr ? args.code : args.grad_code;
  CodePair<kTiles> upcoming =
      load_code<T, kTiles>(given, int64_t{blockIdx.x} * kTileTokens + g, args.num_tokens, q);
  int generation = 0;
  for (int64_t tile_index = blockIdx.x; tile_index < tiles; tile_index += gridDim.x) {
    const int64_t row = tile_index * kTileTokens + g;
    CodePair<kTiles> grad_code = upcoming;
    const int64_t next_tile = tile_index + gridDim.x;
    const CodePair<kTiles> here = upcoming;
    if (next_tile < tiles) {
      upcoming = load_code<T, kTiles>(given, next_tile * kTileTokens + g, args.num_tokens, q);
    }

    if (args.grad_out != nullptr) {
      const CodePair<kTiles> code = turned_pair<kTiles>(here);
      float sum[kTiles][4] = {};
      for (int k = 0; k < stream.count_y; ++k) {
        const int64_t chunk = warp + kBackwardWarps * k;
        uint4 f[kTiles], low, high;
        load_factor<kTiles>(factors.reduce_b, chunk, lane, f);
        stream.next(low, high);
        reduce_chunk<T, kTiles>(sum, low, high, f);
        accumulate_chunk<T, kTiles>(acc_y + chunk * (kChunkUnits * 32), low, high, code, lane);
      }
      // Two generations, so that one barrier a tile is enough: a warp writes over what was read two tiles
      // ago.
      float4* const parts = meeting + generation * (kBackwardWarps * kTiles * 32);
      generation ^= 1;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        parts[(warp * kTiles + tile) * 32 + lane] = {sum[tile][0], sum[tile][1], sum[tile][2], sum[tile][3]};
      }
      __syncthreads();
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        float4 total = parts[tile * 32 + lane];
#pragma unroll
        for (int w = 1; w < kBackwardWarps; ++w) {
          const float4 part = parts[(w * kTiles + tile) * 32 + lane];
          total.x += part.x;
          total.y += part.y;
          total.z += part.z;
          total.w += part.w;
        }
        grad_code.low[tile] = pack_pair<T>(total.x, total.y) & keep[tile];
        grad_code.high[tile] = pack_pair<T>(total.z, total.w) & keep[tile];
        if (args.x == nullptr && warp == 0) {
          T* at = args.grad_code + row * kWidth + tile * 8 + 2 * q;
          if (row < args.num_tokens) *reinterpret_cast<uint32_t*>(at) = grad_code.low[tile];
          if (row + 8 < args.num_tokens) *reinterpret_cast<uint32_t*>(at + 8 * kWidth) = grad_code.high[tile];
        }
      }
    }

    if (args.x != nullptr) {
      const CodePair<kTiles> code = turned_pair<kTiles>(grad_code);
      for (int k = 0; k < stream.count_x; ++k) {
        const int64_t chunk = warp + kBackwardWarps * k, column = chunk * kChunk + q * 8;
        uint4 low, high;
        stream.next(low, high);
        accumulate_chunk<T, kTiles>(acc_x + chunk * (kChunkUnits * 32), low, high, code, lane);
        if (args.dx == nullptr) continue;
        uint4 e[kTiles];
        load_factor<kTiles>(factors.expand_a, chunk, lane, e);
        float v[4][4] = {};
        expand_chunk<T, kTiles>(v, grad_code, e);
        if (column >= args.in_features) continue;
        T* at = args.dx + row * args.in_features + column;
        if (row < args.num_tokens) *reinterpret_cast<uint4*>(at) = rounded_row<T>(v, 0);
        if (row + 8 < args.num_tokens)
          *reinterpret_cast<uint4*>(at + 8 * args.in_features) = rounded_row<T>(v, 1);
      }
    }
  }
  copy_async_wait<0>();

  const auto leave = [&](const float4* acc, float4* partial, int64_t units, int count) {
    for (int k = 0; k < count; ++k) {
      const int64_t first = int64_t{warp + kBackwardWarps * k} * kChunkUnits;
#pragma unroll
      for (int unit = 0; unit < kChunkUnits; ++unit) {
        partial[(blockIdx.x * units + first + unit) * 32 + lane] = acc[(first + unit) * 32 + lane];
      }
    }
  };
  leave(acc_y, args.partial_y, units_y, stream.count_y);
  leave(acc_x, args.partial_x, units_x, stream.count_x);
}

}  // namespace

void lora_fused_backward(const CudaContext& context, const LoraShape& s, const LoraPlan& plan,
                         Factors2 factors, const Coefficients& coefficients, const void* packed,
                         const void* x, const void* grad_out, const void* code, void* dx,
                         LoraGradients gradients, void* workspace) {
  const RankScale scale = rank_scale(s, coefficients);
  if (plan.backward == LoraPath::kStaged) {
    lora_backward_staged(context, s, plan, scale, packed, x, grad_out, code, dx, workspace);
    return lora_finish(context, s, plan, factors, scale, gradients, workspace);
  }
  if (plan.backward != LoraPath::kFused && plan.backward != LoraPath::kFusedHalf) {
    throw std::runtime_error("lora_fused_backward: the plan is another");
  }
  const LoraWorkspace layout(s, plan.blocks);
  char* const base = static_cast<char*>(workspace);
  dispatch_fused(s, [&](auto tag, auto rank_tiles) {
    using T = typename decltype(tag)::type;
    constexpr int kTiles = decltype(rank_tiles)::value;
    const PackedFactors<kTiles> packed_factors(packed, s.in_features, s.out_features);
    BackwardArgs<T> args{s.num_tokens,
                         s.in_features,
                         s.out_features,
                         static_cast<const T*>(grad_out),
                         static_cast<const T*>(x),
                         static_cast<const T*>(code),
                         reinterpret_cast<T*>(base + layout.grad_code),
                         static_cast<T*>(dx),
                         scale,
                         reinterpret_cast<float4*>(base + layout.partial_y),
                         reinterpret_cast<float4*>(base + layout.partial_x),
                         reinterpret_cast<unsigned*>(base + layout.counter)};
    const auto kernel = lora_backward_kernel<T, kTiles>;
    static SharedMemoryGrants grants;
    grants.allow(reinterpret_cast<const void*>(kernel), static_cast<int>(plan.shared_bytes),
                 "lora_fused_backward");
    const auto launch = [&](int64_t units) {
      kernel<<<static_cast<unsigned>(plan.blocks), kBackwardWarps * 32, lora_backward_shared(units, kTiles),
               context.stream>>>(args, packed_factors);
      check_launch("lora_fused_backward");
    };
    if (plan.backward == LoraPath::kFused) {
      launch(layout.units_y + layout.units_x);
    } else {
      const T* const rows = args.x;
      args.x = nullptr;
      launch(layout.units_y);
      args.x = rows;
      args.grad_out = nullptr;
      launch(layout.units_x);
    }
  });
  lora_finish(context, s, plan, factors, scale, gradients, workspace);
}

}  // namespace alore::kernels
