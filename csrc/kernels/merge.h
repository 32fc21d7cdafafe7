// Merges of many adapters in one launch (merge_plan.h says what a merge is):
//   token <- token + token @ W',  W' = sum_e kron(scale[e], enc[e] @ dec[e]),  or  token <- token + code @
//   dec.
// In place, or from a source of the target's shape, dtype and strides, of which the target then holds the
// merge. A source shares no memory with any target of the launch, unless it is its own entry's target.
// Products and sums in float32 (float64 for float64 targets) over factors that are not rounded, and one
// rounding to the target's dtype. The order of every sum depends on the shapes alone: the same bits whatever
// the layout, the alignment, and the other entries of the launch.
#pragma once

#include <cstdint>

#include "kernels/merge_plan.h"

namespace alore::kernels {

// A factor seen through strides, in elements: at(e, x, k) for low-rank factors, with x the position in a
// block and k the rank; at(e, i, j) for scale, from input block i to output block j.
struct MergeFactor {
  const void* data = nullptr;
  int32_t stride_e = 0, stride_x = 0, stride_k = 0;
};

// Where a merge writes, and where it reads: the same address in place.
struct MergeMemory {
  void* target = nullptr;
  const void* source = nullptr;
};

// One merge of a launch. `enc` and `dec` are those of the map over tokens: for side "before" up and down with
// their axes swapped.
struct MergeEntry {
  MergeMemory memory;
  int64_t token_stride = 0, element_stride = 0;
  MergeFactor enc;    // [num_experts, p_in, rank]; low_rank: B, [num_tokens, rank] as (x, k)
  MergeFactor dec;    // [num_experts, p_out, rank]; low_rank: A^T, [token, rank] as (x, k)
  MergeFactor scale;  // [num_experts, s_in, s_out]; low_rank: coeff, [rank], by stride_k
  int32_t num_tokens = 0;
  int32_t s_in = 1, s_out = 1, p_in = 0, p_out = 0;
  int32_t rank = 0, code_width = 0;
  int32_t tokens_per_tile = 1, splits = 1;
  int32_t first_tile = 0;  // of this entry in its launch
  DType factor = DType::kFloat32;
  bool low_rank = false, rows = true;
  bool vectors = false;  // 16 bytes at a time between global and shared memory
};

// The entry of one merge whose plan says that it is taken. Pure: reads nothing behind the pointers.
MergeEntry merge_entry(const MergeShape& shape, const MergePlan& plan, MergeMemory memory, MergeFactor enc,
                       MergeFactor dec, MergeFactor scale);

// As many as fit into the 4 KiB of a kernel's parameters, which every toolkit allows.
inline constexpr int kMergeEntries = 24;

struct MergeTable {
  MergeEntry entries[kMergeEntries];
  int32_t count = 0;
};
static_assert(sizeof(MergeTable) <= 4096);

}  // namespace alore::kernels

#ifdef ALORE_WITH_CUDA
#include "kernels/context.h"

namespace alore::kernels {

// A merge and the plan that took it.
struct PlannedMerge {
  MergeEntry entry;
  MergePlan plan;
};

// All merges of one target dtype, kMergeEntries to a launch. No two of them may share a target's memory.
void merge_grouped(const CudaContext& context, DType target, const PlannedMerge* merges, int64_t count);

}  // namespace alore::kernels
#endif
