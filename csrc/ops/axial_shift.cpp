// What every device shares of the axial shifts: checks, Meta kernels and autograd, which saves nothing.
#include "ops/axial_shift.h"

#include "ops/autograd.h"

namespace alore::ops {

void check_axial_shift(const char* op, const char* name, const Tensor& x, int64_t shift_size) {
  check_floating(op, name, x);
  TORCH_CHECK(x.dim() == 4, op, ": ", name, " must be [batch, channels, height, width], got ", x.sym_sizes());
  TORCH_CHECK(shift_size >= 1, op, ": shift_size must be at least 1, got ", shift_size);
}

void check_axial_shift_pair_backward(const Tensor& grad_width, const Tensor& grad_height,
                                     int64_t shift_size) {
  const char* op = "axial_shift_pair_backward";
  check_axial_shift(op, "grad_width", grad_width, shift_size);
  TORCH_CHECK(grad_height.sym_sizes() == grad_width.sym_sizes(), op,
              ": grad_height must have grad_width's shape ", grad_width.sym_sizes(), ", got ",
              grad_height.sym_sizes());
  TORCH_CHECK(grad_height.scalar_type() == grad_width.scalar_type(), op,
              ": grad_height must have grad_width's dtype ", grad_width.scalar_type(), ", got ",
              grad_height.scalar_type());
  TORCH_CHECK(grad_height.device() == grad_width.device(), op,
              ": grad_height must be on grad_width's device ", grad_width.device(), ", got ",
              grad_height.device());
}

kernels::ShiftAxis shift_axis(const char* op, int64_t dim) {
  TORCH_CHECK(dim == 2 || dim == 3 || dim == -2 || dim == -1, op,
              ": dim must be 2 or -2 (height), or 3 or -1 (width), got ", dim);
  return dim == 2 || dim == -2 ? kernels::ShiftAxis::kHeight : kernels::ShiftAxis::kWidth;
}

kernels::AxialShape axial_shape(const Tensor& x, at::MemoryFormat format, int64_t shift_size,
                                bool transposed) {
  return {.batch = x.size(0),
          .channels = x.size(1),
          .height = x.size(2),
          .width = x.size(3),
          .shift_size = shift_size,
          .channels_last = format == at::MemoryFormat::ChannelsLast,
          .type = kernel_dtype(x.scalar_type()),
          .transposed = transposed};
}

namespace {

Tensor like(const Tensor& x) {
  return at::empty_symint(x.sym_sizes(), x.options(), x.suggest_memory_format());
}

Tensor axial_shift_meta(const Tensor& x, int64_t shift_size, int64_t dim) {
  check_axial_shift("axial_shift", "x", x, shift_size);
  shift_axis("axial_shift", dim);
  return like(x);
}

Tensor axial_shift_backward_meta(const Tensor& grad_out, int64_t shift_size, int64_t dim) {
  check_axial_shift("axial_shift_backward", "grad_out", grad_out, shift_size);
  shift_axis("axial_shift_backward", dim);
  return like(grad_out);
}

T2 axial_shift_pair_meta(const Tensor& x, int64_t shift_size) {
  check_axial_shift("axial_shift_pair", "x", x, shift_size);
  return {like(x), like(x)};
}

Tensor axial_shift_pair_backward_meta(const Tensor& grad_width, const Tensor& grad_height,
                                      int64_t shift_size) {
  check_axial_shift_pair_backward(grad_width, grad_height, shift_size);
  return like(grad_width);
}

class AxialShift : public torch::autograd::Function<AxialShift> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, int64_t shift_size, int64_t dim) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->set_materialize_grads(false);
    ctx->saved_data["shift_size"] = shift_size;
    ctx->saved_data["dim"] = dim;
    return axial_shift_op().call(x, shift_size, dim);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    if (!grad[0].defined()) return variable_list(3);
    return {axial_shift_backward_op().call(grad[0], ctx->saved_data["shift_size"].toInt(),
                                           ctx->saved_data["dim"].toInt()),
            Tensor(), Tensor()};
  }
};

class AxialShiftPair : public torch::autograd::Function<AxialShiftPair> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, int64_t shift_size) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->set_materialize_grads(false);
    ctx->saved_data["shift_size"] = shift_size;
    auto [along_width, along_height] = axial_shift_pair_op().call(x, shift_size);
    return {along_width, along_height};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad) {
    const int64_t shift_size = ctx->saved_data["shift_size"].toInt();
    if (grad[0].defined() && grad[1].defined()) {
      return {axial_shift_pair_backward_op().call(grad[0], grad[1], shift_size), Tensor()};
    }
    for (const auto& [g, dim] : {std::pair{grad[0], 3}, {grad[1], 2}}) {
      if (g.defined()) return {axial_shift_backward_op().call(g, shift_size, dim), Tensor()};
    }
    return variable_list(2);
  }
};

Tensor axial_shift_autograd(const Tensor& x, int64_t shift_size, int64_t dim) {
  return AxialShift::apply(x, shift_size, dim);
}

T2 axial_shift_pair_autograd(const Tensor& x, int64_t shift_size) {
  const auto out = AxialShiftPair::apply(x, shift_size);
  return {out[0], out[1]};
}

Tensor axial_shift_backward_autograd(const Tensor& grad_out, int64_t shift_size, int64_t dim) {
  const auto call = [&] { return std::tuple(axial_shift_backward_op().call(grad_out, shift_size, dim)); };
  return std::get<0>(once_differentiable("axial_shift", call, grad_out));
}

Tensor axial_shift_pair_backward_autograd(const Tensor& grad_width, const Tensor& grad_height,
                                          int64_t shift_size) {
  const auto call = [&] {
    return std::tuple(axial_shift_pair_backward_op().call(grad_width, grad_height, shift_size));
  };
  return std::get<0>(once_differentiable("axial_shift_pair", call, grad_width, grad_height));
}

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, Meta, m) {
  using namespace alore::ops;
  m.impl("axial_shift", axial_shift_meta);
  m.impl("axial_shift_backward", axial_shift_backward_meta);
  m.impl("axial_shift_pair", axial_shift_pair_meta);
  m.impl("axial_shift_pair_backward", axial_shift_pair_backward_meta);
}

TORCH_LIBRARY_IMPL(alore_ext, Autograd, m) {
  using namespace alore::ops;
  m.impl("axial_shift", axial_shift_autograd);
  m.impl("axial_shift_backward", axial_shift_backward_autograd);
  m.impl("axial_shift_pair", axial_shift_pair_autograd);
  m.impl("axial_shift_pair_backward", axial_shift_pair_backward_autograd);
}
