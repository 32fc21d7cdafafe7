#include "ops/backend_cpu.h"
#include "ops/merge.h"
#include "ops/ops.h"

TORCH_LIBRARY_IMPL(alore_ext, CPU, m) {
  alore::ops::register_ops<alore::ops::CpuBackend>(m);
  alore::ops::register_merges<alore::ops::compose_merges>(m);
}
