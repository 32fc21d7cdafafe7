// How the fused ALoRE kernels lay out shared memory: the plan asks for the bytes, the kernels get the
// offsets.
#pragma once

namespace alore::kernels {

inline constexpr int kTileRows = 16;      // tokens of an mma tile
inline constexpr int kGroupColumns = 32;  // columns of a group: 8 a lane, 4 lanes a row
inline constexpr int kCodeTile = 16;      // code columns of an mma tile
inline constexpr int kMaxBlocks = 8;      // of a token, in the fused kernels
inline constexpr int kMaxCodeWidth = 64;
inline constexpr int kMaxStages = 4;  // tiles on their way into shared memory, in backward

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int max_of(int a, int b) { return a > b ? a : b; }
constexpr int align_up(int bytes, int to) { return ceil_div(bytes, to) * to; }

// Rows whose stride is 64 bytes past a multiple of 128 let 8 lanes (2 rows x 4 neighbouring 16-byte pieces)
// read without bank conflicts. Counted in 16-bit elements; at least `columns`, rounded up to a whole group.
constexpr int conflict_free_stride(int columns) { return (columns + 31) / 64 * 64 + 32; }

// The same for rows of floats read as two 16-byte pieces a lane.
constexpr int conflict_free_stride_fp32(int columns) { return (columns * 4 + 111) / 128 * 32 + 4; }

// An adapter's shape and the sizes that follow from it: worked out once on the host, read from the kernel's
// parameters.
struct AdapterDims {
  int num_blocks, block_dim, width;
  int embed_dim;
  int groups_per_block, groups;  // of 32 columns; groups never cross a block
  int code_tiles, padded_width;  // code columns in tiles of 16
  int code_stride;               // of a 16-bit code tile's rows, conflict-free for ldmatrix
  int image_stride;              // of a code image's rows
  int chunks;                    // of 8 columns in a block, padded

  constexpr AdapterDims(int blocks, int block, int code_width)
      : num_blocks(blocks),
        block_dim(block),
        width(code_width),
        embed_dim(blocks * block),
        groups_per_block(ceil_div(block, kGroupColumns)),
        groups(blocks * groups_per_block),
        code_tiles(ceil_div(code_width, kCodeTile)),
        padded_width(code_tiles * kCodeTile),
        code_stride(padded_width + 8),
        image_stride(conflict_free_stride(block)),
        chunks(groups_per_block * 4) {}

  // Bytes of the factors' images (alore_tile.cuh) and of the norm's weight or bias.
  int code_image_bytes() const { return padded_width * image_stride * 2; }
  int output_image_bytes() const { return padded_width * chunks * 8 * 2; }
  int mixing_bytes() const { return num_blocks * num_blocks * padded_width * 4; }
  int affine_bytes() const { return (embed_dim + kGroupColumns) * 4; }
};

// Warps that share a multiprocessor in forward: by the registers that a lane's rows and the work on them
// take, so that nothing spills.
struct ForwardWarps {
  int of_block, blocks;  // warps of a block at most, blocks of a multiprocessor
};
constexpr ForwardWarps forward_warps(int groups_per_warp, bool wide_input, bool norm) {
  if (wide_input) return {8, 1};
  if (groups_per_warp == 4 || (groups_per_warp == 6 && !norm)) return {8, 2};
  return groups_per_warp == 6 ? ForwardWarps{12, 1} : ForwardWarps{6, 2};
}

// A forward thread's own stage: its pieces of 16 bytes, and one more, so that an odd stride keeps neighbours'
// accesses in different banks.
constexpr int stage_bytes_per_thread(int groups_per_warp, bool wide_input) {
  return (groups_per_warp * 2 * (wide_input ? 2 : 1) + 1) * 16;
}

struct ForwardLayout {
  int down = 0, up = 0, mixing = 0, weight = 0, bias = 0;  // shared by the block's teams
  int teams = 0, team_bytes = 0;                           // one team of warps a tile
  int stage = 0, statistics = 0, code = 0, mixed = 0;      // within a team's part
  int bytes = 0;

  ForwardLayout(const AdapterDims& d, int groups_per_warp, int warps_per_tile, int tiles_per_block, bool norm,
                bool wide_input) {
    up = down + d.code_image_bytes();
    mixing = up + d.output_image_bytes();
    weight = mixing + d.mixing_bytes();
    bias = weight + (norm ? d.affine_bytes() : 0);
    teams = bias + (norm ? d.affine_bytes() : 0);
    statistics = stage + warps_per_tile * 32 * stage_bytes_per_thread(groups_per_warp, wide_input);
    code = statistics + warps_per_tile * kTileRows * 8;
    mixed = code + (warps_per_tile + d.num_blocks - 1) * kTileRows * d.padded_width * 4;
    team_bytes = mixed + d.num_blocks * kTileRows * d.code_stride * 2;
    bytes = teams + tiles_per_block * team_bytes;
  }
};

struct BackwardLayout {
  int down = 0, up = 0, down_out = 0, mixing = 0, weight = 0, bias = 0;
  int affine_image = 0;                // weight and bias as 16-bit sums of two: [4, grad_stride]
  int down_weight = 0, down_bias = 0;  // sum_j weight[j] down[j,:] and sum_j bias[j] down[j,:] of each block
  int code = 0, grad_mixed = 0;        // fp32 Z and dH: [key_splits, row_tiles, num_blocks, 16, padded_width]
  int mixed = 0, grad_code = 0;        // 16-bit H and dZ: [row_tiles, num_blocks, 16, code_stride]
  int row_sums = 0;                    // float2 [row_tiles * num_blocks * key_splits, 16]
  int row_means = 0;                   // float2 [row_tiles * 16, 2]
  int stages = 0, stage_bytes = 0;
  int x_stride = 0, grad_stride = 0;  // elements
  int grad = 0, mean = 0, rstd = 0;   // within a stage; x is at 0
  int bytes = 0;

  BackwardLayout(const AdapterDims& d, int threads, int row_tiles, int num_stages, int key_splits, bool norm,
                 bool wide_input) {
    const int rows = row_tiles * kTileRows, tiles = row_tiles * d.num_blocks;
    up = down + d.code_image_bytes();
    down_out = up + d.code_image_bytes();
    mixing = down_out + d.output_image_bytes();
    weight = mixing + d.mixing_bytes();
    bias = weight + (norm ? d.affine_bytes() : 0);
    affine_image = bias + (norm ? d.affine_bytes() : 0);
    grad_stride = conflict_free_stride(d.embed_dim);
    down_weight = affine_image + (norm ? 4 * grad_stride * 2 : 0);
    down_bias = down_weight + (norm ? d.num_blocks * d.padded_width * 4 : 0);
    code = down_bias + (norm ? d.num_blocks * d.padded_width * 4 : 0);
    grad_mixed = code + key_splits * tiles * kTileRows * d.padded_width * 4;
    mixed = grad_mixed + key_splits * tiles * kTileRows * d.padded_width * 4;
    grad_code = mixed + tiles * kTileRows * d.code_stride * 2;
    row_sums = grad_code + tiles * kTileRows * d.code_stride * 2;
    row_means = row_sums + (norm ? tiles * key_splits * kTileRows * 8 : 0);
    stages = align_up(row_means + (norm ? rows * 2 * 8 : 0), 128);
    const int dim = d.embed_dim;
    x_stride = wide_input ? conflict_free_stride_fp32(dim) : conflict_free_stride(dim);
    grad = rows * x_stride * (wide_input ? 4 : 2);
    mean = grad + rows * grad_stride * 2;
    rstd = mean + rows * 4;
    stage_bytes = align_up(rstd + rows * 4, 128);
    bytes = stages + num_stages * stage_bytes;
    // At the end the block's sums lie from `code` on: both factors' gradients, then one row of d(scale) a
    // thread.
    const int sums = max_of(2 * d.width * d.block_dim, threads * d.num_blocks) * 4;
    bytes = max_of(bytes, code + sums);
  }
};

}  // namespace alore::kernels
