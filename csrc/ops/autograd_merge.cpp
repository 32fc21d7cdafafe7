// What autograd must know of the in-place merges: they cannot be differentiated, and they change tensors that
// an earlier graph may hold.
#include "ops/autograd.h"

namespace alore::ops {
namespace {

template <typename... Tensors>
void refuse_recording(const char* op, const Tensors&... tensors) {
  TORCH_CHECK(!any_requires_grad(tensors...), op,
              ": merging is not differentiable; call it under torch.no_grad()");
}

// Asked before anything is written: an inference tensor has no version to bump outside inference mode.
template <typename... Name>
void refuse_inference(const char* op, const OptTensor& t, const Name&... name) {
  TORCH_CHECK(!t.has_value() || !t->defined() || !t->is_inference() || c10::InferenceMode::is_enabled(), op,
              ": ", name..., " was made in inference mode and can only be changed there");
}

void bump_version(const OptTensor& t) {
  if (t.has_value() && t->defined() && !t->is_inference()) torch::autograd::impl::bump_version(*t);
}

void merge_kron_autograd(const Tensor& weight, const OptTensor& bias, const Tensor& scale, const Tensor& down,
                         const Tensor& up, std::string_view side) {
  constexpr const char* op = "merge_kron_";
  refuse_recording(op, weight, bias, scale, down, up);
  refuse_inference(op, weight, "weight");
  refuse_inference(op, bias, "bias");
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    merge_kron__op().call(weight, bias, scale, down, up, side);
  }
  bump_version(weight);
  bump_version(bias);
}

void merge_lora_autograd(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b,
                         const Tensor& coeff) {
  constexpr const char* op = "merge_lora_";
  refuse_recording(op, weight, lora_a, lora_b, coeff);
  refuse_inference(op, weight, "weight");
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    merge_lora__op().call(weight, lora_a, lora_b, coeff);
  }
  bump_version(weight);
}

void merge_kron_grouped_autograd(TensorList weight, TensorList bias, at::IntArrayRef bias_of,
                                 TensorList scale, TensorList down, TensorList up, const Strings& side,
                                 OptTensorList source) {
  constexpr const char* op = "merge_kron_grouped_";
  refuse_recording(op, weight, bias, scale, down, up, source.value_or(TensorList()));
  for (size_t i = 0; i < weight.size(); ++i) refuse_inference(op, weight[i], "weight[", i, "]");
  for (size_t j = 0; j < bias.size() && j < bias_of.size(); ++j) {
    refuse_inference(op, bias[j], "bias[", bias_of[j], "]");
  }
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    merge_kron_grouped__op().call(weight, bias, bias_of, scale, down, up, side, source);
  }
  for (const Tensor& t : weight) bump_version(t);
  for (const Tensor& t : bias) bump_version(t);
}

void merge_lora_grouped_autograd(TensorList weight, TensorList lora_a, TensorList lora_b, TensorList coeff,
                                 OptTensorList source) {
  constexpr const char* op = "merge_lora_grouped_";
  refuse_recording(op, weight, lora_a, lora_b, coeff, source.value_or(TensorList()));
  for (size_t i = 0; i < weight.size(); ++i) refuse_inference(op, weight[i], "weight[", i, "]");
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    merge_lora_grouped__op().call(weight, lora_a, lora_b, coeff, source);
  }
  for (const Tensor& t : weight) bump_version(t);
}

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, Autograd, m) {
  using namespace alore::ops;
  m.impl("merge_kron_", merge_kron_autograd);
  m.impl("merge_lora_", merge_lora_autograd);
  m.impl("merge_kron_grouped_", merge_kron_grouped_autograd);
  m.impl("merge_lora_grouped_", merge_lora_grouped_autograd);
}
