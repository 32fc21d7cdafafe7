// Shared memory of the norm and low-rank kernels, which deal a tile out like the pipelined ALoRE kernels.
#pragma once

#include "kernels/alore_pipelined_layout.h"

namespace alore::kernels {

inline constexpr int kCodeColumns = 8;  // R at most: one mma tile

// A behind the norm, D = weight * A, in shared memory: offsets in bytes, strides in elements.
struct CodeImages {
  int factor_stride;
  int factor = 0;                       // [8, factor_stride] 16-bit
  int weight = 0, bias = 0;             // [dim] floats
  int column_sum = 0, column_bias = 0;  // [8] floats: sum_j D[w,j] and sum_j bias[j] A[w,j]
  int bytes = 0;

  explicit constexpr CodeImages(int dim) : factor_stride(dim + 8) {
    weight = factor + kCodeColumns * factor_stride * 2;
    bias = weight + dim * 4;
    column_sum = bias + dim * 4;
    column_bias = column_sum + kCodeColumns * 4;
    bytes = column_bias + kCodeColumns * 4;
  }
  // Of what they are made from, for a while: two sums of every 32 entries.
  static constexpr int scratch_bytes(int dim) { return 2 * kCodeColumns * dim / 32 * 4; }
};

struct NormLoraForwardLayout : PipelinedSizes {
  CodeImages images;
  int first_team = 0, team_bytes = 0;         // below: within a team's part
  int code = 0, row_sums = 0, row_terms = 0;  // floats [warps, 16, 8]; float2 [warps, 16], [rows]
  int stages = 0, stage_bytes = 0;
  int bytes = 0;

  explicit constexpr NormLoraForwardLayout(PipelinedShape shape) : PipelinedSizes(shape), images(dim) {
    first_team = align_up(images.bytes, 128);
    row_sums = code + warps * kTileRows * kCodeColumns * 4;
    row_terms = row_sums + warps * kTileRows * 8;
    stages = align_up(row_terms + rows * 8, 128);
    stage_bytes = align_up(rows * row_stride * 2, 128);
    team_bytes = stages + kPipelinedStages * stage_bytes;
    bytes = first_team + teams * team_bytes;
  }
};

struct NormLoraBackwardLayout : PipelinedSizes {
  CodeImages images;
  int sum_stride;                   // floats
  int weight16 = 0;                 // [dim] 16-bit, in the order of product operands (by_lane)
  int scaled = 0;                   // [rows, 8] 16-bit: R = rstd * grad_code
  int row_sums = 0, row_terms = 0;  // float2 [warps, 16]; float4 [rows]
  int stages = 0, stage_bytes = 0;
  int grad = 0, grad_code = 0, code = 0, mean = 0, rstd = 0;  // within a stage; x is at 0
  int sums = 0, thread_sums = 0, totals = 0;                  // at the end, in the stages' place
  int bytes = 0;

  explicit constexpr NormLoraBackwardLayout(PipelinedShape shape)
      : PipelinedSizes(shape), images(dim), sum_stride(dim + 4) {
    weight16 = images.bytes;
    scaled = align_up(weight16 + dim * 2, 16);
    row_sums = scaled + rows * kCodeColumns * 2;
    row_terms = row_sums + warps * kTileRows * 8;
    stages = align_up(row_terms + rows * 16, 128);
    grad = rows * row_stride * 2;
    grad_code = 2 * grad;
    code = grad_code + rows * kCodeColumns * 2;
    mean = code + rows * kCodeColumns * 2;
    rstd = mean + rows * 4;
    stage_bytes = align_up(rstd + rows * 4, 128);
    sums = stages;                                                   // [row_tiles, 8, sum_stride]
    thread_sums = sums + row_tiles * kCodeColumns * sum_stride * 4;  // [2, mixers]
    totals = thread_sums + 2 * mixers * 4;                           // [2, 16]
    bytes = max_of(stages + kPipelinedStages * stage_bytes, totals + 2 * kCodeTile * 4);
  }
};

}  // namespace alore::kernels
