// Where the fused low-rank kernels keep things: sizes that the plan and the launchers must agree on.
#pragma once

#include "kernels/lora.h"

namespace alore::kernels {

inline constexpr int kForwardWarps = 8, kBackwardWarps = 16;

constexpr int64_t lora_chunks(int64_t features) { return (features + kChunk - 1) / kChunk; }

// Sums of gradients are kept in units of one mma accumulator tile, 16 features by 8 rank rows: 32 lanes of a
// float4. A chunk of 32 features holds 2 * rank_tiles of them, [chunk][half][rank tile].
constexpr int64_t lora_units(int64_t features, int rank_tiles) {
  return lora_chunks(features) * 2 * rank_tiles;
}
inline constexpr size_t kUnitBytes = 32 * 16;

// Chunks of 16 tokens by 32 features that each warp has in flight.
constexpr int lora_depth(int rank_tiles) { return rank_tiles == 1 ? 4 : 3; }

// Shared memory of the backward kernel: the sums, each warp's ring of loads, and two generations of the
// warps' partial codes.
constexpr size_t lora_backward_shared(int64_t units, int rank_tiles) {
  return kUnitBytes * (static_cast<size_t>(units) + kBackwardWarps * lora_depth(rank_tiles) * 2 +
                       2 * kBackwardWarps * rank_tiles);
}

// The staged backward: 12 warps, each with at most `chunks_y` chunks of grad_out and `chunks_x` of x in every
// tile of 16 * row_tiles tokens.
struct StagedShape {
  int chunks_y, chunks_x, row_tiles;
};
inline constexpr int kStagedWarps = 12;
inline constexpr StagedShape kStagedShapes[] = {{1, 1, 4}, {3, 1, 2}, {6, 2, 1}};

// Its shared memory, in bytes: two stages of [grad_out | x | code], and the warps' partial codes. Rows are an
// odd number of 16-byte pieces apart.
struct StagedLayout {
  int y_stride, x_stride;
  int x, code, stage_bytes;  // within a stage
  int parts, bytes;

  constexpr StagedLayout(int in_features, int out_features, int row_tiles)
      : y_stride((out_features / 8 | 1) * 16), x_stride((in_features / 8 | 1) * 16) {
    const int rows = row_tiles * static_cast<int>(kTileTokens);
    x = rows * y_stride;
    code = x + rows * x_stride;
    stage_bytes = (code + rows * 16 + 127) / 128 * 128;
    parts = 2 * stage_bytes;
    bytes = parts + row_tiles * kStagedWarps * static_cast<int>(kUnitBytes);
  }
};

// The backward's scratch memory, offsets in bytes.
struct LoraWorkspace {
  int64_t units_y, units_x;
  size_t partial_y = 0, partial_x = 0;  // [blocks, units, 32] float4
  size_t coeff = 0;                     // [units_y / rank_tiles, 8 * rank_tiles] float
  size_t grad_code = 0;                 // [num_tokens, 8 * rank_tiles], activation type
  size_t counter = 0;                   // one unsigned
  size_t bytes = 0;

  LoraWorkspace(const LoraShape& s, int64_t blocks) {
    const int tiles = static_cast<int>(round_up(s.rank, 8) / 8);
    units_y = lora_units(s.out_features, tiles);
    units_x = lora_units(s.in_features, tiles);
    partial_y = add(static_cast<size_t>(blocks * units_y) * kUnitBytes);
    partial_x = add(static_cast<size_t>(blocks * units_x) * kUnitBytes);
    coeff = add(static_cast<size_t>(units_y) * 8 * sizeof(float));
    grad_code = add(static_cast<size_t>(s.num_tokens * 8 * tiles) * 2);
    counter = add(sizeof(unsigned));
  }

 private:
  size_t add(size_t count) {
    const size_t at = bytes;
    bytes += (count + 255) / 256 * 256;
    return at;
  }
};

}  // namespace alore::kernels
