// The axial shifts on CUDA: one launch each.
#include "ops/axial_shift.h"

#include "ops/backend_cuda.h"
#include "ops/cuda_call.h"

namespace alore::ops {
namespace {

struct AxialCuda {
  using Guard = CudaBackend::Guard;

  static void shift(const kernels::AxialShape& s, kernels::ShiftAxis axis, const Tensor& x,
                    const Tensor& out) {
    kernels::axial_shift(stream_context(), s, axis, read(x), write(out));
  }

  static void shift_pair(const kernels::AxialShape& s, const Tensor& x, const Tensor& along_width,
                         const Tensor& along_height) {
    kernels::axial_shift_pair(stream_context(), s, read(x), write(along_width), write(along_height));
  }

  static void shift_sum(const kernels::AxialShape& s, const Tensor& a, const Tensor& b, const Tensor& out) {
    kernels::axial_shift_sum(stream_context(), s, read(a), read(b), write(out));
  }
};

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, CUDA, m) { alore::ops::register_axial_shift<alore::ops::AxialCuda>(m); }
