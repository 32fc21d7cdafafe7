// The low-rank side of a linear with an adapter of its own for each sample of a batch, on CUDA, and the plan
// that says where it runs. Adapters differ in rank; the features are the batch's.
//
// y0 = bias + ((x A_i^T) * c_i) B_i^T is written first, and the caller's base product accumulates onto it:
// the product reads y0 in its epilogue, behind its arithmetic, where adding to a finished y would read and
// write all of it again. Which adapter a sample takes is read on the device, so that a launch copies nothing
// and can be captured in a graph.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "kernels/lora.h"

namespace alore::kernels {

struct LoraGroupedPlan {
  bool fused = false;
  const char* reason = "";     // why not, where it is not
  int64_t refused = 0;         // the adapter that it is about
  int rank_tiles = 0;          // of the adapter of most rank rows, 8 rows to a tile
  size_t workspace_bytes = 0;  // for the packed factors of all adapters

  std::string to_string() const;
};

inline constexpr int64_t kMaxGroupedRank = 64;

// Each shape is the whole batch's under one adapter, with one coefficient a rank row: they agree in all but
// rank and factor. At least one; num_tokens is a multiple of num_samples.
LoraGroupedPlan plan_lora_grouped(int64_t num_samples, std::span<const LoraShape> shapes);

// Where an adapter's packed factors begin, in 16 bytes from the first adapter's, and its tiles of rank rows.
struct PackedAdapter {
  int32_t first, tiles;
};

// One adapter's packed factors: A, then B, [chunk of 32 features][tile][32 lanes] of 16 bytes each.
constexpr int64_t lora_grouped_vectors(const LoraShape& s) {
  return (round_up(s.in_features, kChunk) + round_up(s.out_features, kChunk)) * round_up(s.rank, 8) / 8;
}

// The workspace begins with a PackedAdapter for each adapter.
constexpr int64_t lora_grouped_directory_bytes(int64_t num_adapters) {
  return round_up(num_adapters * static_cast<int64_t>(sizeof(PackedAdapter)), 16);
}

}  // namespace alore::kernels

#ifdef ALORE_WITH_CUDA
#include "kernels/context.h"

namespace alore::kernels {

struct LoraAdapter {
  const void* a = nullptr;      // [rank, in_features], factor type, contiguous
  const void* b = nullptr;      // [out_features, rank], factor type, contiguous
  const void* coeff = nullptr;  // [rank], factor type
};

// x, bias, y and workspace start at multiples of 16 bytes.
struct LoraGroupedArgs {
  const void* x;                          // [num_samples, tokens, in_features]
  const void* bias;                       // [out_features], activation type, or null
  std::span<const LoraAdapter> adapters;  // one a shape
  const int64_t* index;                   // [num_samples], on the device: an adapter, or -1 for none
  void* workspace;                        // [plan.workspace_bytes]
  void* y;                                // [num_samples, tokens, out_features], overwritten
};

// y = bias + the low-rank side of each sample's adapter, rounded once; bias alone (or 0) where there is none.
// Rank rows whose coefficient is 0 add exactly nothing. Traps on an index that is neither. Needs plan.fused.
// One launch that packs every 96 adapters, and one over the tokens.
void lora_grouped_forward(const CudaContext& context, int64_t num_samples, std::span<const LoraShape> shapes,
                          const LoraGroupedPlan& plan, const LoraGroupedArgs& args);

}  // namespace alore::kernels
#endif
