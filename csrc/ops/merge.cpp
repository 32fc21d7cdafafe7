// In-place merging, the same code on CPU and CUDA: products in float32 (float64 for float64), one rounding at
// the end.
#include <ATen/Context.h>

#include "ops/dispatch.h"
#include "ops/ops.h"

namespace alore::ops {
namespace {

at::ScalarType merge_type(const Tensor& weight, const Tensor& factor) {
  return at::promote_types(accumulate_type(weight.scalar_type()), accumulate_type(factor.scalar_type()));
}

void merge_kron_(const Tensor& weight, const OptTensor& bias, const Tensor& scale, const Tensor& down,
                 const Tensor& up, std::string_view side) {
  check_merge_kron(weight, bias, scale, down, up, side);
  const at::NoTF32Guard exact;
  const NoAutocast no_autocast;
  const auto acc = merge_type(weight, scale);
  const Tensor w = weight.to(acc), s = scale.to(acc), d = down.to(acc), u = up.to(acc);
  if (side == "before") {
    // W (I + W')^T: a row of W is a token of the transposed map, whose factors are S^T, U^T, D^T.
    weight.copy_(w + kron_linear_op().call(w, s.transpose(1, 2), u.transpose(1, 2), d.transpose(1, 2)));
    return;
  }
  // (I + W')^T W: a column of W is a token of the map itself, and so is the bias.
  const Tensor columns = w.t().contiguous();
  weight.copy_((columns + kron_linear_op().call(columns, s, d, u)).t());
  if (bias.has_value() && bias->defined()) {
    const auto wide = merge_type(*bias, scale);
    const Tensor b = bias->to(wide);
    bias->copy_(b +
                kron_linear_op().call(b.unsqueeze(0), scale.to(wide), down.to(wide), up.to(wide)).squeeze(0));
  }
}

void merge_lora_(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, const Tensor& coeff) {
  check_merge_lora(weight, lora_a, lora_b, coeff);
  const at::NoTF32Guard exact;
  const NoAutocast no_autocast;
  const auto acc = merge_type(weight, lora_a);
  weight.copy_(at::addmm(weight.to(acc), lora_b.to(acc) * coeff.to(acc), lora_a.to(acc)));
}

}  // namespace

void register_merges(torch::Library& m) {
  m.impl("merge_kron_", merge_kron_);
  m.impl("merge_lora_", merge_lora_);
}

}  // namespace alore::ops
