// The axial shifts on CPU, a share of the planes or rows to each thread.
#include "ops/axial_shift.h"

#include <ATen/Parallel.h>

#include "ops/backend_cpu.h"

namespace alore::ops {
namespace {

struct AxialCpu {
  using Guard = CpuBackend::Guard;

  static void shift(const kernels::AxialShape& s, kernels::ShiftAxis axis, const Tensor& x,
                    const Tensor& out) {
    const int64_t pieces = kernels::axial_shift_pieces_cpu(s);
    const int64_t grain = std::max<int64_t>(1, at::internal::GRAIN_SIZE * pieces / x.numel());
    const void* in = x.const_data_ptr();
    void* result = out.mutable_data_ptr();
    at::parallel_for(0, pieces, grain, [&](int64_t begin, int64_t end) {
      kernels::axial_shift_cpu(s, axis, in, begin, end, result);
    });
  }

  static void shift_pair(const kernels::AxialShape& s, const Tensor& x, const Tensor& along_width,
                         const Tensor& along_height) {
    shift(s, kernels::ShiftAxis::kWidth, x, along_width);
    shift(s, kernels::ShiftAxis::kHeight, x, along_height);
  }

  static void shift_sum(const kernels::AxialShape& s, const Tensor& a, const Tensor& b, const Tensor& out) {
    shift(s, kernels::ShiftAxis::kWidth, a, out);
    const Tensor other = at::empty_like(b);
    shift(s, kernels::ShiftAxis::kHeight, b, other);
    out.add_(other);
  }
};

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, CPU, m) { alore::ops::register_axial_shift<alore::ops::AxialCpu>(m); }
