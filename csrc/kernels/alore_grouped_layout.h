// Shared memory of the grouped kernel: what every sample needs first, then one adapter's part.
#pragma once

#include "kernels/alore_layout.h"

namespace alore::kernels {

inline constexpr int kGroupedWarps = 8;

struct GroupedLayout {
  int base_stride;             // elements
  int base = 0, weight, bias;  // 16-bit [16, base_stride]; fp32 [embed_dim + 32] with a norm
  int adapter;                 // where an adapter's part begins

  GroupedLayout(int embed_dim, bool norm) : base_stride(conflict_free_stride(embed_dim)) {
    const int affine = norm ? (embed_dim + kGroupColumns) * 4 : 0;
    weight = base + kTileRows * base_stride * 2;
    bias = weight + affine;
    adapter = bias + affine;
  }
};

struct GroupedAdapterLayout {
  int splits;  // warps that share one product of a block with a code tile, each a part of its columns
  int down, up, mixing;  // the factors' images
  int code, mixed;       // fp32 [splits, num_blocks, 16, padded_width]; 16-bit [num_blocks, 16, code_stride]
  int bytes;

  GroupedAdapterLayout(const GroupedLayout& common, const AdapterDims& d) : down(common.adapter) {
    const int products = d.num_blocks * d.code_tiles;
    splits = kGroupedWarps / products;
    if (splits > d.groups_per_block) splits = d.groups_per_block;
    if (splits < 1) splits = 1;
    up = down + d.code_image_bytes();
    mixing = up + d.output_image_bytes();
    code = mixing + d.mixing_bytes();
    mixed = code + splits * d.num_blocks * kTileRows * d.padded_width * 4;
    bytes = mixed + d.num_blocks * kTileRows * d.code_stride * 2;
  }
};

}  // namespace alore::kernels
