// The kernels of the fused adapter, by plan. Each is one launch.
#pragma once

#include "kernels/alore.h"

namespace alore::kernels {

// Needs plan.pipelined.
void alore_forward_pipelined(const CudaContext& context, const AloreShape& shape,
                             const AloreForwardPlan& plan, const AloreForwardArgs& args);

// The backward kernels leave one partial sum of the factors' gradients a block in args.workspace:
// [plan.blocks, scale | down | up] floats.

// Needs plan.pipelined. d(down) is left as [num_experts, rank, block_dim].
void alore_backward_pipelined(const CudaContext& context, const AloreShape& shape,
                              const AloreBackwardPlan& plan, const AloreBackwardArgs& args);

// Any other plan that is fused.
void alore_backward_tiles(const CudaContext& context, const AloreShape& shape, const AloreBackwardPlan& plan,
                          const AloreBackwardArgs& args);

}  // namespace alore::kernels
