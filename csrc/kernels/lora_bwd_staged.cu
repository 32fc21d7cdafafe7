// The backward of the low-rank side for the widths that backbones have: the results of lora_bwd.cu's kernel,
// with the sums of both gradients and the factors in registers, where that kernel reads and writes its sums
// in shared memory with every product.
//
// A block takes 16 * kRowTiles tokens at a time through shared memory, grad_out, x and the code beside each
// other, two tiles in turn. Its warps share the features, chunk by chunk; they meet over their parts of
// grad_out (B c), then use it on their parts of x. Features count in whole chunks. Where something else reads
// x (norm_lora_bwd.cu), kX is 0 and grad_out (B c) is what leaves.
#include "kernels/async_copy.cuh"
#include "kernels/lora_mma.cuh"

namespace alore::kernels {
namespace {

template <typename T>
struct StagedArgs {
  int64_t num_tokens;
  int in_features, out_features;
  const T *grad_out, *x;
  const T* code;  // [num_tokens, 8]
  T* dx;          // [num_tokens, in_features] or null
  T* grad_code;   // [num_tokens, 8]: without x, grad_out (B c)
  RankScale scale;
  float4 *partial_y, *partial_x;  // [blocks, units, 32]
  unsigned* counter;              // set to 0 for the kernel behind this one
};

// One kind of row on its way into a stage: a thread copies the same 16-byte piece of every step-th row.
template <typename T, int kRows>
__device__ __forceinline__ void stage_rows(unsigned char* to, int stride, const T* from, int features,
                                           int64_t first, int64_t num_tokens) {
  constexpr int kThreads = kStagedWarps * 32;
  const int pieces = features / 8, step = kThreads / pieces;  // at most one row of kThreads pieces
  const int row0 = threadIdx.x / pieces, piece = threadIdx.x - row0 * pieces;
  if (row0 >= step) return;
  const int live_rows = static_cast<int>(min(num_tokens - first, static_cast<int64_t>(kRows)));
#pragma unroll 4
  for (int row = row0; row < kRows; row += step) {
    const bool live = row < live_rows;
    copy_async_16(to + row * stride + piece * 16, from + (live ? (first + row) * features + piece * 8 : 0),
                  live);
  }
}

template <typename T, int kY, int kX, int kRowTiles>
__global__ void __launch_bounds__(kStagedWarps * 32, 1)
    lora_backward_staged_kernel(const __grid_constant__ StagedArgs<T> args, PackedFactors<1> factors) {
  static_assert((kY > kX ? kY : kX) * kChunk / 8 <= 32,
                "a row must not have more pieces than the block has threads");
  extern __shared__ __align__(128) unsigned char shared_bytes[];
  wait_for_launches_before();
  constexpr int kRows = kRowTiles * static_cast<int>(kTileTokens);
  const StagedLayout layout(args.in_features, args.out_features, kRowTiles);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto [g, q] = Lane(lane);
  const int chunks_y = args.out_features / static_cast<int>(kChunk);
  const int chunks_x = args.in_features / static_cast<int>(kChunk);
  auto* const parts = reinterpret_cast<float4*>(shared_bytes + layout.parts);  // [row tile][warp][lane]
  const int64_t tiles = (args.num_tokens + kRows - 1) / kRows;
  if (blockIdx.x == 0 && threadIdx.x == 0) *args.counter = 0u;

  const auto load = [&](int64_t tile, int stage) {
    if (tile < tiles) {
      unsigned char* const to = shared_bytes + stage * layout.stage_bytes;
      const int64_t first = tile * kRows;
      stage_rows<T, kRows>(to, layout.y_stride, args.grad_out, args.out_features, first, args.num_tokens);
      if constexpr (kX > 0)
        stage_rows<T, kRows>(to + layout.x, layout.x_stride, args.x, args.in_features, first,
                             args.num_tokens);
      stage_rows<T, kRows>(to + layout.code, 16, args.code, 8, first, args.num_tokens);
    }
    copy_async_commit();
  };
  load(blockIdx.x, 0);
  load(blockIdx.x + int64_t{gridDim.x}, 1);

  // This warp's factors as operands: B c to reduce grad_out, A to expand its code.
  constexpr int kHeldX = kX > 0 ? kX : 1;  // no array may be empty
  uint32_t reduce[kY][2][2], expand[kHeldX][4];
#pragma unroll
  for (int k = 0; k < kY; ++k) {
    const int chunk = min(warp + k * kStagedWarps, chunks_y - 1);
    const auto* words = reinterpret_cast<const uint32_t*>(factors.reduce_b + chunk * 32);
#pragma unroll
    for (int i = 0; i < 4; ++i) reduce[k][i / 2][i % 2] = __ldg(words + (g * 4 + i) * 4 + q);
  }
#pragma unroll
  for (int k = 0; k < kX; ++k) {
    const int chunk = min(warp + k * kStagedWarps, chunks_x - 1);
    const auto* words = reinterpret_cast<const uint32_t*>(factors.expand_a + chunk * 32);
#pragma unroll
    for (int t = 0; t < 4; ++t) expand[k][t] = __ldg(words + ((2 * t + g % 2) * 4 + q) * 4 + g / 2);
  }
  const uint32_t keep = (args.scale.template at<T>(2 * q) != 0.0f ? 0x0000ffffu : 0u) |
                        (args.scale.template at<T>(2 * q + 1) != 0.0f ? 0xffff0000u : 0u);

  float acc_y[kY][2][4] = {}, acc_x[kHeldX][2][4] = {};
  int stage = 0;
#pragma unroll 1
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    copy_async_wait<1>();
    __syncthreads();
    unsigned char* const in = shared_bytes + stage * layout.stage_bytes;
    const uint32_t y_rows = shared_address(in), x_rows = y_rows + layout.x, code_rows = y_rows + layout.code;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const uint32_t y_at = y_rows + r * 16 * layout.y_stride;
      uint32_t code[2];
      load_matrices_transposed(code, code_rows + (r * 16 + lane % 16) * 16);
      float sum[4] = {};
#pragma unroll
      for (int k = 0; k < kY; ++k) {
        const int chunk = warp + k * kStagedWarps;
        if (chunk >= chunks_y) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t piece = y_at + chunk * 64 + half * 32;
          uint32_t m[4];
          load_matrices(m, piece + operand_rows(lane, layout.y_stride));
          mma<T>(sum, m[0], m[1], m[2], m[3], reduce[k][half][0], reduce[k][half][1]);
          load_matrices_transposed(m, piece + operand_turned(lane, layout.y_stride));
          mma<T>(acc_y[k][half], m[0], m[1], m[2], m[3], code[0], code[1]);
        }
      }
      parts[(r * kStagedWarps + warp) * 32 + lane] = {sum[0], sum[1], sum[2], sum[3]};
    }
    __syncthreads();

#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      if (kX > 0 ? warp >= chunks_x : warp != r) continue;
      float4 total = parts[r * kStagedWarps * 32 + lane];
#pragma unroll
      for (int w = 1; w < kStagedWarps; ++w) {
        const float4 part = parts[(r * kStagedWarps + w) * 32 + lane];
        total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
      }
      const uint32_t low = pack_pair<T>(total.x, total.y) & keep,
                     high = pack_pair<T>(total.z, total.w) & keep;
      const int64_t row = tile * kRows + r * 16;
      if constexpr (kX == 0) {
        if (row + g < args.num_tokens)
          *reinterpret_cast<uint32_t*>(args.grad_code + (row + g) * 8 + 2 * q) = low;
        if (row + g + 8 < args.num_tokens)
          *reinterpret_cast<uint32_t*>(args.grad_code + (row + g + 8) * 8 + 2 * q) = high;
      }
      const uint32_t low_turned = transpose8x8(low), high_turned = transpose8x8(high);
      unsigned char* const rows = in + layout.x + r * 16 * layout.x_stride;
#pragma unroll
      for (int k = 0; k < kX; ++k) {
        const int chunk = warp + k * kStagedWarps;
        if (chunk >= chunks_x) break;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          uint32_t m[4];
          load_matrices_transposed(m, x_rows + r * 16 * layout.x_stride + chunk * 64 + half * 32 +
                                          operand_turned(lane, layout.x_stride));
          mma<T>(acc_x[k][half], m[0], m[1], m[2], m[3], low_turned, high_turned);
        }
        if (args.dx == nullptr) continue;
        // d(x) takes x's place, so that it leaves in pieces of 16 bytes: once the whole warp has read that.
        __syncwarp();
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          float out[4] = {};
          mma8<T>(out, low, high, expand[k][t]);
          unsigned char* const at = rows + g * layout.x_stride + chunk * 64 + t * 16 + q * 4;
          *reinterpret_cast<uint32_t*>(at) = pack_pair<T>(out[0], out[1]);
          *reinterpret_cast<uint32_t*>(at + 8 * layout.x_stride) = pack_pair<T>(out[2], out[3]);
        }
        __syncwarp();
#pragma unroll
        for (int upper = 0; upper < 16; upper += 8) {
          const int own = upper + g;
          if (row + own >= args.num_tokens) continue;
          const uint4 v = *reinterpret_cast<const uint4*>(rows + own * layout.x_stride + chunk * 64 + q * 16);
          store_16(args.dx + (row + own) * args.in_features + chunk * kChunk + q * 8, v);
        }
      }
    }
    __syncthreads();
    load(tile + 2 * int64_t{gridDim.x}, stage);
    stage ^= 1;
  }
  copy_async_wait<0>();

  const auto leave = [&](auto& acc, int count, float4* partial, int chunks) {
    float4* const own = partial + int64_t{blockIdx.x} * chunks * 64 + lane;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const int chunk = warp + k * kStagedWarps;
      if (chunk >= chunks) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        own[(chunk * 2 + half) * 32] = {acc[k][half][0], acc[k][half][1], acc[k][half][2], acc[k][half][3]};
      }
    }
  };
  leave(acc_y, kY, args.partial_y, chunks_y);
  if constexpr (kX > 0) leave(acc_x, kX, args.partial_x, chunks_x);
}

template <typename T, bool kReadsX, int kIndex = 0>
void launch(const CudaContext& context, const LoraPlan& plan, bool overlaps_launches,
            const StagedArgs<T>& args, const PackedFactors<1>& factors) {
  constexpr StagedShape kShape = kStagedShapes[kIndex];
  if (plan.staged_shape != kIndex) {
    if constexpr (kIndex + 1 < std::size(kStagedShapes))
      return launch<T, kReadsX, kIndex + 1>(context, plan, overlaps_launches, args, factors);
    throw std::runtime_error("lora_fused_backward: no staged kernel for these widths");
  }
  const auto kernel = lora_backward_staged_kernel < T, kShape.chunks_y, kReadsX ? kShape.chunks_x : 0,
             kShape.row_tiles > ;
  static SharedMemoryGrants grants;
  const int bytes = static_cast<int>(plan.shared_bytes);
  grants.allow(reinterpret_cast<const void*>(kernel), bytes, "lora_fused_backward");
  launch_overlapping(kernel, context, static_cast<int>(plan.blocks), kStagedWarps * 32, bytes,
                     overlaps_launches, "lora_fused_backward", args, factors);
}

// x, or grad_code, is null.
template <bool kReadsX>
void run(const CudaContext& context, const LoraShape& s, const LoraPlan& plan, const RankScale& scale,
         const void* packed, const void* x, const void* grad_out, const void* code, void* dx, void* grad_code,
         bool overlaps_launches, void* workspace) {
  const LoraWorkspace layout(s, plan.blocks);
  char* const base = static_cast<char*>(workspace);
  dispatch_fused(s, [&](auto tag, auto) {
    using T = typename decltype(tag)::type;
    launch<T, kReadsX>(
        context, plan, overlaps_launches,
        StagedArgs<T>{s.num_tokens, static_cast<int>(s.in_features), static_cast<int>(s.out_features),
                      static_cast<const T*>(grad_out), static_cast<const T*>(x), static_cast<const T*>(code),
                      static_cast<T*>(dx), static_cast<T*>(grad_code), scale,
                      reinterpret_cast<float4*>(base + layout.partial_y),
                      reinterpret_cast<float4*>(base + layout.partial_x),
                      reinterpret_cast<unsigned*>(base + layout.counter)},
        PackedFactors<1>(packed, s.in_features, s.out_features));
  });
}

}  // namespace

void lora_backward_staged(const CudaContext& context, const LoraShape& s, const LoraPlan& plan,
                          const RankScale& scale, const void* packed, const void* x, const void* grad_out,
                          const void* code, void* dx, void* workspace) {
  run<true>(context, s, plan, scale, packed, x, grad_out, code, dx, nullptr, false, workspace);
}

void lora_output_backward(const CudaContext& context, const LoraShape& s, const LoraPlan& plan,
                          const RankScale& scale, const void* packed, const void* grad_out, const void* code,
                          void* grad_code, bool overlaps_launches, void* workspace) {
  run<false>(context, s, plan, scale, packed, nullptr, grad_out, code, nullptr, grad_code, overlaps_launches,
             workspace);
}

}  // namespace alore::kernels
