// How one merge runs on a GPU: a pure function of shape, dtypes, strides and the shared memory that
// a block may have. It touches no device, so a test can print it and assert it at its boundaries.
//
// A merge is a map over the tokens of a matrix: token <- token + token @ W'. The rows of a weight are tokens
// of the transposed map (side "before"), its columns and the bias tokens of the map itself ("after"). A
// low-rank merge, W <- W + B diag(coeff) A, has the rows of W as its tokens and B's rows as their codes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "kernels/dtype.h"

namespace alore::kernels {

struct MergeShape {
  int64_t num_tokens = 0;
  int64_t num_experts = 1;
  int64_t s_in = 1, s_out = 1;  // blocks that a token is cut into, and is rebuilt from
  int64_t p_in = 0, p_out = 0;  // width of a block; s_in * p_in == s_out * p_out
  int64_t rank = 0;             // of an expert
  bool low_rank = false;        // no encoding: num_experts, s_in and s_out are 1
  DType target = DType::kFloat32;
  DType factor = DType::kFloat32;
  int64_t token_stride = 0, element_stride = 1;  // of the target, in elements

  int64_t code_width() const { return num_experts * rank; }
};

struct MergePlan {
  bool taken = false;       // whether the grouped kernel takes this merge
  const char* reason = "";  // where not: why
  bool rows = true;         // whether neighbouring threads read along a token, or across tokens
  int tokens_per_tile = 0;  // tokens of one thread block
  int64_t num_tiles = 0;    // thread blocks
  int splits = 1;           // low_rank: tiles side by side along a token
  size_t shared_bytes = 0;  // dynamic shared memory of a thread block

  std::string to_string() const;
};

// Shared memory in bytes that a block may ask for: 8.6 and 8.9 have the least of the GPUs that are built for.
inline constexpr size_t kLeastSharedLimit = 99 * 1024;

MergePlan plan_merge(const MergeShape& shape, size_t shared_limit);

// ---- What the plan and the kernel must agree in
// ------------------------------------------------------------

inline constexpr int kMergeThreads = 128;
inline constexpr int kMergeChunk = 32;    // elements of each token block that are staged at a time
inline constexpr int kMergeColumns = 16;  // columns of the code that are computed at a time
inline constexpr int kMergeGroups = 2;   // groups of threads that share rows and split what is done with them
inline constexpr int kMergeSplit = 256;  // elements of a token in one tile of a low-rank merge

// Rows (token blocks) of a thread. Measured in instructions: 4 rows bring the loads from shared memory below
// half of the multiply-adds; float64 has half the registers to spend.
constexpr int merge_rows_per_thread(DType acc) { return acc == DType::kFloat64 ? 1 : 4; }
constexpr int merge_rows(DType acc) { return kMergeThreads / kMergeGroups * merge_rows_per_thread(acc); }

// Elements of 16 bytes: what one load moves. As a pad behind each staged row it makes the stride an odd
// number of such loads, so that eight neighbouring rows lie in different banks.
constexpr int merge_vector(DType t) { return static_cast<int>(16 / size_of(t)); }
constexpr int merge_stage_stride(DType target) { return kMergeChunk + merge_vector(target); }
constexpr int merge_code_stride(DType acc) { return kMergeColumns + merge_vector(acc); }

// The staged chunk or, in its place, one step's code: of all rows that threads hold, even where a tile has
// fewer, so that a thread's rows are a constant apart.
constexpr size_t merge_stage_bytes(DType target) {
  const DType acc = accumulate_type(target);
  const size_t chunk = merge_stage_stride(target) * size_of(target),
               code = merge_code_stride(acc) * size_of(acc);
  return merge_rows(acc) * (chunk > code ? chunk : code);
}

// Staged factors, [kMergeChunk, kMergeColumns] with a pad of 16 bytes for each `unit` rows, which are what a
// thread works through at a time: groups of threads that read different units find them in different banks.
constexpr int merge_factor_elements(DType target, DType acc) {
  return kMergeChunk * kMergeColumns + kMergeChunk / merge_vector(target) * merge_vector(acc);
}

}  // namespace alore::kernels
