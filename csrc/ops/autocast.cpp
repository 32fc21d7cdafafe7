// Autocast: x and frozen weights go to the lower precision, low-rank factors stay as they are (fp32 master
// factors cost nothing: the kernels read them directly). layer_norm_alore takes x as it comes and writes the
// lower precision itself.
#include <ATen/autocast_mode.h>

#include "ops/dispatch.h"

namespace alore::ops {
namespace {

template <c10::DeviceType device>
struct Lower {
  static at::ScalarType dtype() { return at::autocast::get_autocast_dtype(device); }
  static Tensor cast(const Tensor& t) { return at::autocast::cached_cast(dtype(), t, device); }
  static OptTensor cast(const OptTensor& t) {
    return t.has_value() && t->defined() ? OptTensor(cast(*t)) : t;
  }

  // A factor is left in float32, or follows x where it is 16-bit itself; kernels refuse other mixtures.
  static Tensor factor(const Tensor& t, const Tensor& x) {
    return t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble ? t : t.to(x.scalar_type());
  }

  static OptTensor factor(const OptTensor& t, const Tensor& x) {
    return t.has_value() && t->defined() ? OptTensor(factor(*t, x)) : t;
  }

  static std::vector<Tensor> factors(TensorList list, const Tensor& x) {
    std::vector<Tensor> out;
    for (const Tensor& t : list) out.push_back(factor(t, x));
    return out;
  }

  static constexpr c10::DispatchKey key =
      device == c10::kCUDA ? c10::DispatchKey::AutocastCUDA : c10::DispatchKey::AutocastCPU;

  static Tensor kron_linear(const Tensor& x, const Tensor& scale, const Tensor& down, const Tensor& up) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    const Tensor low = cast(x);
    return kron_linear_op().call(low, factor(scale, low), factor(down, low), factor(up, low));
  }

  static Tensor alore(const Tensor& x, const Tensor& scale, const Tensor& down, const Tensor& up,
                      const OptTensor& seed, double dropout_p) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    const Tensor low = cast(x);
    return alore_op().call(low, factor(scale, low), factor(down, low), factor(up, low), seed, dropout_p);
  }

  static std::tuple<Tensor, Tensor, Tensor> layer_norm_alore(const Tensor& x, const OptTensor& weight,
                                                             const OptTensor& bias, double eps,
                                                             const Tensor& scale, const Tensor& down,
                                                             const Tensor& up, const OptTensor& seed,
                                                             double dropout_p,
                                                             std::optional<at::ScalarType> out_dtype) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    // A 16-bit x of the other kind is brought to the autocast dtype; fp32 is read as it is, fp64 is left
    // alone.
    const bool wide = x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble;
    const Tensor in = wide ? x : cast(x);
    if (x.scalar_type() == at::kFloat && !out_dtype.has_value()) out_dtype = dtype();
    return layer_norm_alore_op().call(in, factor(weight, in), factor(bias, in), eps, factor(scale, in),
                                      factor(down, in), factor(up, in), seed, dropout_p, out_dtype);
  }

  static T4 add_layer_norm_alore(const Tensor& x, const Tensor& residual, const OptTensor& weight,
                                 const OptTensor& bias, double eps, const Tensor& scale, const Tensor& down,
                                 const Tensor& up, const OptTensor& seed, double dropout_p,
                                 std::optional<at::ScalarType> out_dtype) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    // A sum is taken in the wider type of the two, as eager addition under autocast would.
    const auto sum_type = at::promote_types(x.scalar_type(), residual.scalar_type());
    const bool wide = sum_type == at::kFloat || sum_type == at::kDouble;
    const auto type = wide ? sum_type : dtype();
    const Tensor in = x.to(type), other = residual.to(type);
    if (sum_type == at::kFloat && !out_dtype.has_value()) out_dtype = dtype();
    return add_layer_norm_alore_op().call(in, other, factor(weight, in), factor(bias, in), eps,
                                          factor(scale, in), factor(down, in), factor(up, in), seed,
                                          dropout_p, out_dtype);
  }

  // A float32 weight is passed on: the op folds the update into it and rounds once, in the place of this
  // cast.
  static Tensor base_weight(const Tensor& weight, const Tensor& x) {
    return is_folding(x, weight) ? weight : cast(weight);
  }

  static T3 masked_lora_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                               const Tensor& lora_a, const Tensor& lora_b, const Tensor& coeff) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    const Tensor low = cast(x);
    return masked_lora_linear_op().call(low, base_weight(weight, low), cast(bias), factor(lora_a, low),
                                        factor(lora_b, low), factor(coeff, low));
  }

  static T4 mlae_linear(const Tensor& x, const Tensor& weight, const OptTensor& bias, const Tensor& lora_a,
                        const Tensor& lora_b, const Tensor& coeff, double mask_p, bool training) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    const Tensor low = cast(x);
    return mlae_linear_op().call(low, base_weight(weight, low), cast(bias), factor(lora_a, low),
                                 factor(lora_b, low), factor(coeff, low), mask_p, training);
  }

  static T7 layer_norm_mlae_linear(const Tensor& x, const OptTensor& norm_weight, const OptTensor& norm_bias,
                                   double eps, const Tensor& weight, const OptTensor& bias,
                                   const Tensor& lora_a, const Tensor& lora_b, const Tensor& coeff,
                                   double mask_p, bool training) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    const Tensor low = cast(x);
    return layer_norm_mlae_linear_op().call(low, factor(norm_weight, low), factor(norm_bias, low), eps,
                                            base_weight(weight, low), cast(bias), factor(lora_a, low),
                                            factor(lora_b, low), factor(coeff, low), mask_p, training);
  }

  static Tensor kron_linear_grouped(const Tensor& x, TensorList scale, TensorList down, TensorList up,
                                    const Tensor& index) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    const Tensor low = cast(x);
    return kron_linear_grouped_op().call(low, factors(scale, low), factors(down, low), factors(up, low),
                                         index);
  }

  static Tensor alore_grouped(const Tensor& x, TensorList scale, TensorList down, TensorList up,
                              const Tensor& index) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    const Tensor low = cast(x);
    return alore_grouped_op().call(low, factors(scale, low), factors(down, low), factors(up, low), index);
  }

  // As layer_norm_alore.
  static Tensor layer_norm_alore_grouped(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                         double eps, TensorList scale, TensorList down, TensorList up,
                                         const Tensor& index, std::optional<at::ScalarType> out_dtype) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    const bool wide = x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble;
    const Tensor in = wide ? x : cast(x);
    if (x.scalar_type() == at::kFloat && !out_dtype.has_value()) out_dtype = dtype();
    return layer_norm_alore_grouped_op().call(in, factor(weight, in), factor(bias, in), eps,
                                              factors(scale, in), factors(down, in), factors(up, in), index,
                                              out_dtype);
  }

  // The base weight serves all samples, so no update can be folded into it.
  static Tensor masked_lora_linear_grouped(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                           TensorList lora_a, TensorList lora_b, TensorList coeff,
                                           const Tensor& index) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(key);
    const Tensor low = cast(x);
    return masked_lora_linear_grouped_op().call(low, cast(weight), cast(bias), factors(lora_a, low),
                                                factors(lora_b, low), factors(coeff, low), index);
  }

  static void register_ops(torch::Library& m) {
    m.impl("kron_linear", kron_linear);
    m.impl("alore", alore);
    m.impl("layer_norm_alore", layer_norm_alore);
    m.impl("add_layer_norm_alore", add_layer_norm_alore);
    m.impl("masked_lora_linear", masked_lora_linear);
    m.impl("mlae_linear", mlae_linear);
    m.impl("layer_norm_mlae_linear", layer_norm_mlae_linear);
    m.impl("kron_linear_grouped", kron_linear_grouped);
    m.impl("alore_grouped", alore_grouped);
    m.impl("layer_norm_alore_grouped", layer_norm_alore_grouped);
    m.impl("masked_lora_linear_grouped", masked_lora_linear_grouped);
  }
};

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, AutocastCUDA, m) { alore::ops::Lower<c10::kCUDA>::register_ops(m); }
TORCH_LIBRARY_IMPL(alore_ext, AutocastCPU, m) { alore::ops::Lower<c10::kCPU>::register_ops(m); }
