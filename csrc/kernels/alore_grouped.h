// The fused ALoRE forward with an adapter of its own for each sample of a batch, on CUDA. Adapters differ in
// num_experts, num_blocks and rank; embed_dim is the batch's.
//
// Which adapter a sample takes is read on the device. Adapters are described in the kernel's parameters, so a
// launch copies nothing and can be captured in a graph; where there are more than fit, samples of the others
// are left to another launch.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/alore.h"

namespace alore::kernels {

struct AloreGroupedPlan {
  bool fused = false;
  const char* reason = "";  // why not, where it is not
  int64_t refused = 0;      // the adapter that it is about
  int64_t blocks_per_sample = 0;
  int shared_bytes = 0;
};

// Each shape is the whole batch's under one adapter: they agree in all but num_experts, num_blocks,
// block_dim, rank and factor. At least one; num_tokens is a multiple of num_samples. Fused where
// alore_forward would be for each.
AloreGroupedPlan plan_alore_grouped(int64_t num_samples, std::span<const AloreShape> shapes,
                                    const DeviceLimits& device);

}  // namespace alore::kernels

#ifdef ALORE_WITH_CUDA
#include "kernels/context.h"

namespace alore::kernels {

// x and out start at multiples of 16 bytes.
struct AloreGroupedArgs {
  const void* x;  // [num_samples, tokens, embed_dim]
  AloreNormArgs norm;
  std::span<const AloreAdapter> adapters;  // one a shape
  const int64_t* index;                    // [num_samples], on the device: an adapter, or -1 for none
  void* out;                               // like x, overwritten
};

// One launch for every 128 adapters. A sample without an adapter gets the base alone, or zeros without
// add_base; the kernel traps on an index that is neither. Needs plan.fused.
void alore_grouped_forward(const CudaContext& context, int64_t num_samples,
                           std::span<const AloreShape> shapes, const AloreGroupedPlan& plan,
                           const AloreGroupedArgs& args);

}  // namespace alore::kernels
#endif
