#include "ops/backend_cuda.h"
#include "ops/merge.h"
#include "ops/ops.h"

TORCH_LIBRARY_IMPL(alore_ext, CUDA, m) {
  alore::ops::register_ops<alore::ops::CudaBackend>(m);
  alore::ops::register_merges<alore::ops::launch_merges>(m);
}
