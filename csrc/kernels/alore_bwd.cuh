// The two kernels of the fused backward, by plan: each leaves one partial sum of the factors' gradients a
// block in args.workspace, [plan.blocks, scale | down | up] floats.
#pragma once

#include "kernels/alore.h"

namespace alore::kernels {

// Any plan that is fused and not pipelined.
void alore_backward_tiles(const CudaContext& context, const AloreShape& shape, const AloreBackwardPlan& plan,
                          const AloreBackwardArgs& args);

// Needs plan.pipelined.
void alore_backward_pipelined(const CudaContext& context, const AloreShape& shape,
                              const AloreBackwardPlan& plan, const AloreBackwardArgs& args);

}  // namespace alore::kernels
