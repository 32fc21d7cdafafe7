// Shared memory of the pipelined ALoRE kernels. Everything follows from the width, so that a kernel has its
// layout as constants; the plan takes the bytes from here.
#pragma once

#include "kernels/alore_layout.h"

namespace alore::kernels {

inline constexpr int kPipelinedBlocks = 4;  // of a row; one tile of 16 code columns
inline constexpr int kPipelinedStages = 3;  // tiles in shared memory: two at work, one on its way

// How one width is dealt out: a tile is 16 * row_tiles tokens, a warp has `items` neighbouring groups of 32
// columns of one block and one row tile, `teams` of warps share a block's images, each with tiles of its own.
struct PipelinedShape {
  int groups, row_tiles, items, teams;
};
inline constexpr PipelinedShape kPipelinedForward[] = {{4, 2, 1, 3},  {8, 2, 2, 3},  {12, 1, 1, 2},
                                                       {16, 1, 2, 3}, {24, 1, 2, 2}, {32, 1, 2, 1}};
inline constexpr PipelinedShape kPipelinedBackward[] = {
    {4, 4, 1, 1}, {8, 2, 1, 1}, {12, 1, 1, 1}, {16, 1, 1, 1}, {24, 1, 2, 1}};

// What both passes derive from a shape.
struct PipelinedSizes {
  int items, row_tiles, teams, rows, dim, block_dim;
  int columns;               // of a warp
  int per_row_tile, splits;  // warps of a row tile; those of one of its blocks
  int warps, threads;        // of a team
  int row_stride;            // elements: an odd number of 16-byte pieces, for ldmatrix
  int mixers;                // threads that mix codes, a code column each

  explicit constexpr PipelinedSizes(PipelinedShape s)
      : items(s.items),
        row_tiles(s.row_tiles),
        teams(s.teams),
        rows(s.row_tiles * kTileRows),
        dim(s.groups * kGroupColumns),
        block_dim(dim / kPipelinedBlocks),
        columns(s.items * kGroupColumns),
        per_row_tile(s.groups / s.items),
        splits(per_row_tile / kPipelinedBlocks),
        warps(per_row_tile * s.row_tiles),
        threads(warps * 32),
        row_stride(dim + 8),
        mixers(threads < rows * kCodeTile ? threads : rows * kCodeTile) {}

  constexpr int code_bytes() const { return warps * kTileRows * kCodeTile * 4; }
};

// The factors in shared memory: offsets in bytes, strides in elements.
struct FactorImages {
  static constexpr int kMixingStride = 20;  // floats of a code column's [4, 4]: conflict-free in 16 bytes
  static constexpr int kCodeStride = kCodeTile + 8;  // of a 16-bit code's rows

  int down_stride, up_stride;
  int down = 0, up = 0;  // [16, down_stride]: weight * down of every block, or down; [16, up_stride]
  int weight = 0;        // [dim] floats, by_lane
  int mixing = 0;        // [16, kMixingStride] floats
  int down_mean = 0, down_bias = 0;  // [16, 4] floats: sums over a block's columns of `down`; bias @ down
  int bytes = 0;

  constexpr FactorImages(int dim, bool norm)
      : down_stride((norm ? dim : dim / kPipelinedBlocks) + 8), up_stride(dim / kPipelinedBlocks + 8) {
    up = down + kCodeTile * down_stride * 2;
    weight = up + kCodeTile * up_stride * 2;
    mixing = weight + (norm ? dim * 4 : 0);
    down_mean = mixing + kCodeTile * kMixingStride * 4;
    down_bias = down_mean + (norm ? kCodeTile * kPipelinedBlocks * 4 : 0);
    bytes = down_bias + (norm ? kCodeTile * kPipelinedBlocks * 4 : 0);
  }
  // Of what they are made from, for a while.
  static constexpr int scratch_bytes(int dim) { return (kCodeTile * dim / kPipelinedBlocks + dim) * 4; }
};

struct PipelinedForwardLayout : PipelinedSizes {
  FactorImages images;
  int bias = 0;                        // [dim] floats, by_lane
  int first_team = 0, team_bytes = 0;  // below: within a team's part
  int code = 0, mixed = 0;             // fp32 shares of Z [warps, 16, 16]; 16-bit H [row_tiles, 4, 16, 24]
  int row_sums = 0, row_terms = 0;     // float2 [warps, 16], [rows]
  int stages = 0, stage_bytes = 0;
  int bytes = 0;

  constexpr PipelinedForwardLayout(PipelinedShape shape, bool norm)
      : PipelinedSizes(shape), images(dim, norm) {
    bias = images.bytes;
    first_team = align_up(bias + (norm ? dim * 4 : 0), 128);
    mixed = code + code_bytes();
    row_sums = mixed + rows * kPipelinedBlocks * FactorImages::kCodeStride * 2;
    row_terms = row_sums + (norm ? warps * kTileRows * 8 : 0);
    stages = align_up(row_terms + (norm ? rows * 8 : 0), 128);
    stage_bytes = align_up(rows * row_stride * 2, 128);
    team_bytes = stages + kPipelinedStages * stage_bytes;
    bytes = first_team + teams * team_bytes;
  }
};

struct PipelinedBackwardLayout : PipelinedSizes {
  FactorImages images;
  int sum_stride;                   // floats
  int weight16 = 0;                 // [dim] 16-bit, by_lane
  int code = 0, grad_mixed = 0;     // fp32 shares of Z and dH: [warps, 16, 16]
  int mixed = 0, grad_code = 0;     // 16-bit H and dZ: [row_tiles, 4, 16, 24]
  int row_sums = 0, row_terms = 0;  // float2 [warps, 16]; float4 [rows]
  int stages = 0, stage_bytes = 0;
  int grad = 0, mean = 0, rstd = 0;                     // within a stage; x is at 0
  int sums = 0, thread_sums = 0, totals = 0, bias = 0;  // at the end, in the stages' place
  int bytes = 0;

  constexpr PipelinedBackwardLayout(PipelinedShape shape, bool norm)
      : PipelinedSizes(shape), images(dim, norm), sum_stride(block_dim + 8) {
    weight16 = images.bytes;
    code = weight16 + (norm ? dim * 2 : 0);
    grad_mixed = code + code_bytes();
    mixed = grad_mixed + code_bytes();
    grad_code = mixed + rows * kPipelinedBlocks * FactorImages::kCodeStride * 2;
    row_sums = grad_code + rows * kPipelinedBlocks * FactorImages::kCodeStride * 2;
    row_terms = row_sums + (norm ? warps * kTileRows * 8 : 0);
    stages = align_up(row_terms + (norm ? rows * 16 : 0), 128);
    grad = rows * row_stride * 2;
    mean = 2 * grad;
    rstd = mean + rows * 4;
    stage_bytes = align_up(rstd + rows * 4, 128);
    sums = stages;  // d(down) | d(up): [2, row_tiles * 4, 16, sum_stride]
    thread_sums = sums + 2 * row_tiles * kPipelinedBlocks * kCodeTile * sum_stride * 4;  // [24, mixers]
    totals = thread_sums + 24 * mixers * 4;                                              // [2, 4, 16]
    bias = totals + 2 * kPipelinedBlocks * kCodeTile * 4;                                // [dim]
    bytes = max_of(stages + kPipelinedStages * stage_bytes, bias + (norm ? dim * 4 : 0));
  }
};

}  // namespace alore::kernels
