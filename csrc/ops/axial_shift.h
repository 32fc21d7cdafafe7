// axial_shift and axial_shift_pair with their backwards, written once over AxialCpu and AxialCuda. Results
// have the input's memory format: NCHW, or channels_last where the strides say so; other strides are made one
// of the two.
#pragma once

#include "kernels/axial_shift.h"
#include "ops/common.h"

namespace alore::ops {

using T2 = std::tuple<Tensor, Tensor>;

// ---- Checks: the same on CPU, CUDA and Meta
// ------------------------------------------------------------------------

void check_axial_shift(const char* op, const char* name, const Tensor& x, int64_t shift_size);
void check_axial_shift_pair_backward(const Tensor& grad_width, const Tensor& grad_height, int64_t shift_size);
// The axis that dim, counted from either end, names.
kernels::ShiftAxis shift_axis(const char* op, int64_t dim);

// x is dense in `format`.
kernels::AxialShape axial_shape(const Tensor& x, at::MemoryFormat format, int64_t shift_size,
                                bool transposed);

template <typename Backend>
Tensor shift_one(const Tensor& x, int64_t shift_size, kernels::ShiftAxis axis, bool transposed) {
  const typename Backend::Guard guard(x);
  const auto format = x.suggest_memory_format();
  const Tensor in = x.contiguous(format), out = at::empty(x.sizes(), x.options(), format);
  if (in.numel() > 0) Backend::shift(axial_shape(in, format, shift_size, transposed), axis, in, out);
  return out;
}

template <typename Backend>
Tensor axial_shift(const Tensor& x, int64_t shift_size, int64_t dim) {
  check_axial_shift("axial_shift", "x", x, shift_size);
  return shift_one<Backend>(x, shift_size, shift_axis("axial_shift", dim), false);
}

template <typename Backend>
Tensor axial_shift_backward(const Tensor& grad_out, int64_t shift_size, int64_t dim) {
  check_axial_shift("axial_shift_backward", "grad_out", grad_out, shift_size);
  return shift_one<Backend>(grad_out, shift_size, shift_axis("axial_shift_backward", dim), true);
}

template <typename Backend>
T2 axial_shift_pair(const Tensor& x, int64_t shift_size) {
  check_axial_shift("axial_shift_pair", "x", x, shift_size);
  const typename Backend::Guard guard(x);
  const auto format = x.suggest_memory_format();
  const Tensor in = x.contiguous(format), along_width = at::empty(x.sizes(), x.options(), format),
               along_height = at::empty(x.sizes(), x.options(), format);
  if (in.numel() > 0) {
    Backend::shift_pair(axial_shape(in, format, shift_size, false), in, along_width, along_height);
  }
  return {along_width, along_height};
}

template <typename Backend>
Tensor axial_shift_pair_backward(const Tensor& grad_width, const Tensor& grad_height, int64_t shift_size) {
  check_axial_shift_pair_backward(grad_width, grad_height, shift_size);
  const typename Backend::Guard guard(grad_width);
  const auto format = grad_width.suggest_memory_format();
  const Tensor a = grad_width.contiguous(format), b = grad_height.contiguous(format),
               out = at::empty(a.sizes(), a.options(), format);
  if (out.numel() > 0) Backend::shift_sum(axial_shape(a, format, shift_size, true), a, b, out);
  return out;
}

// Registers the ops of one backend under the current dispatch key.
template <typename Backend>
void register_axial_shift(torch::Library& m) {
  m.impl("axial_shift", axial_shift<Backend>);
  m.impl("axial_shift_backward", axial_shift_backward<Backend>);
  m.impl("axial_shift_pair", axial_shift_pair<Backend>);
  m.impl("axial_shift_pair_backward", axial_shift_pair_backward<Backend>);
}

}  // namespace alore::ops
