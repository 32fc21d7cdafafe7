// The fused ALoRE adapter on CUDA: an optional residual sum, an optional layer norm, the Kronecker map of
// ALoRE eq. (6) and its residual, in one pass over the tokens.
//
//   sum  = x (+ residual)
//   base = layer_norm(sum), or sum without the norm
//   out  = base + dropout(base @ W'), or base @ W' alone;  W' = sum_e kron(scale[e], down[e] @ up[e])
//
// W' is square (num_blocks blocks of block_dim on both sides) and never built. Products run on the tensor
// cores from 16-bit operands with fp32 sums, as a 16-bit GEMM would; statistics and mixing over blocks are
// fp32. What the fused path does not take (plan.fused is false, plan.reason says why) is composed from
// layer_norm.h, kron.h and dropout.h.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/dtype.h"

namespace alore::kernels {

struct AloreShape {
  int64_t num_tokens = 0;
  int64_t num_experts = 0;
  int64_t num_blocks = 0;  // blocks that a token is cut into; num_experts in the paper
  int64_t block_dim = 0;   // embed_dim / num_blocks
  int64_t rank = 0;
  DType input = DType::kBFloat16;  // of x, residual, sum and grad_x
  DType output =
      DType::kBFloat16;            // of out and grad_out: input's type, or 16-bit under fp32 input (autocast)
  DType factor = DType::kFloat32;  // of scale, down, up and their gradients
  DType affine = DType::kFloat32;  // of the norm's weight and bias
  bool norm = true;
  bool add_base = true;   // false: out = base @ W' alone
  bool dropout = false;   // plans depend on these two: they must say what the arguments do
  bool residual = false;  // in backward: `sum` was an output and has a gradient

  int64_t embed_dim() const { return num_blocks * block_dim; }
  int64_t width() const { return num_experts * rank; }
  int64_t scale_size() const { return num_experts * num_blocks * num_blocks; }
  int64_t down_size() const { return num_experts * block_dim * rank; }
};

// What a plan needs to know of a device.
struct DeviceLimits {
  int capability = 0;            // 10 * major + minor
  int num_sms = 0;               // streaming multiprocessors
  int64_t shared_per_block = 0;  // bytes, opted in: 227 KiB on 9.0, 163 KiB on 8.0, 99 KiB on 8.6 and 8.9
};

// The least of a device's limits and of those that the code it runs was compiled for: a 9.0 device may
// run 8.0 PTX, which has neither the larger shared memory nor the waits of overlapping launches.
constexpr DeviceLimits limits_of_build(DeviceLimits device, int compiled_capability) {
  if (compiled_capability >= 90 || compiled_capability >= device.capability) return device;
  const int64_t shared = (compiled_capability == 80 || compiled_capability == 87 ? 163 : 99) * 1024;
  return {compiled_capability, device.num_sms,
          device.shared_per_block < shared ? device.shared_per_block : shared};
}

// A tile is 16 tokens. Its row is cut into groups of 32 columns that never cross a block; `warps_per_tile`
// warps hold `groups_per_warp` groups each in registers. Pipelined, a tile may be two such row tiles beside
// each other, and rows are in shared memory.
struct AloreForwardPlan {
  bool fused = false;
  bool pipelined = false;   // by alore_fwd_pipelined.cu: `tiles_per_block` teams, each with tiles of its own
  const char* reason = "";  // why not, where it is not
  int groups_per_warp = 0, warps_per_tile = 0, tiles_per_block = 0;
  bool even = false;  // blocks are whole groups and warps have full counts: no column needs a check
  int blocks = 0;
  int shared_bytes = 0;
  bool overlaps_launches = false;  // pipelined: begins while the launch before it ends (9.0 and later)

  std::string to_string() const;
};

// A block takes 16 * row_tiles tokens at a time through shared memory, `stages` loads in flight.
struct AloreBackwardPlan {
  bool fused = false;
  bool pipelined = false;  // by alore_bwd_pipelined.cu
  const char* reason = "";
  int warps = 0, row_tiles = 0, stages = 0;
  int key_splits = 0;      // warps that share one block's code product, each a part of its columns
  int items_per_warp = 0;  // (32 columns, 16 code columns) pieces of the factor gradients that a warp sums
  int parts = 0;           // warps that share one piece, each a part of the tile's rows
  int blocks = 0;
  int shared_bytes = 0;
  int64_t workspace_bytes = 0;     // one partial sum of every factor gradient a block
  bool overlaps_launches = false;  // both launches begin while the one before ends (9.0 and later)

  std::string to_string() const;
};

AloreForwardPlan plan_alore_forward(const AloreShape& shape, const DeviceLimits& device);
AloreBackwardPlan plan_alore_backward(const AloreShape& shape, const DeviceLimits& device);

}  // namespace alore::kernels

#ifdef ALORE_WITH_CUDA
#include "kernels/context.h"

namespace alore::kernels {

// What the current device runs: 10 * major + minor of the architecture that its code was compiled for.
int compiled_capability();

struct AloreAdapter {
  const void* scale;  // [num_experts, num_blocks, num_blocks]
  const void* down;   // [num_experts, block_dim, rank]
  const void* up;     // [num_experts, rank, block_dim]
};

struct AloreNormArgs {
  const void* weight = nullptr;  // [embed_dim], null: ones
  const void* bias = nullptr;    // [embed_dim], null: zeros
  float eps = 0.0f;
};

struct AloreDropout {
  const int64_t* seed = nullptr;  // on the device; the mask is dropout.h's
  double p = 0.0;
};

// x, residual, sum, out and their gradients start at multiples of 16 bytes.
struct AloreForwardArgs {
  const void* x;                   // [num_tokens, embed_dim]
  const void* residual = nullptr;  // [num_tokens, embed_dim] or null
  AloreNormArgs norm;
  AloreAdapter adapter;
  AloreDropout dropout;
  void* out;              // [num_tokens, embed_dim], overwritten
  void* sum = nullptr;    // [num_tokens, embed_dim], overwritten; given when residual is
  float* mean = nullptr;  // [num_tokens], overwritten; given with the norm
  float* rstd = nullptr;  // [num_tokens]
};

// One launch. Needs plan.fused.
void alore_forward(const CudaContext& context, const AloreShape& shape, const AloreForwardPlan& plan,
                   const AloreForwardArgs& args);

struct AloreBackwardArgs {
  const void* grad_out;            // [num_tokens, embed_dim]
  const void* grad_sum = nullptr;  // gradient of `sum` as an output, or null
  const void* sum;                 // [num_tokens, embed_dim]: x (+ residual) of the forward
  AloreNormArgs norm;
  const float* mean = nullptr;
  const float* rstd = nullptr;
  AloreAdapter adapter;
  AloreDropout dropout;
  void* grad_x =
      nullptr;  // [num_tokens, embed_dim], overwritten; null: not wanted. residual's gradient is the same.
  void* grad_scale;  // like the adapter; overwritten
  void* grad_down;
  void* grad_up;
  void* workspace;
};

// Two launches. Sums are taken in a fixed order: two runs on the same device give the same bits. Needs
// plan.fused.
void alore_backward(const CudaContext& context, const AloreShape& shape, const AloreBackwardPlan& plan,
                    const AloreBackwardArgs& args);

}  // namespace alore::kernels
#endif
