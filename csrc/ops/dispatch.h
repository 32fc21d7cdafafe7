// Typed handles to the ops themselves, for code that calls one from above the backends (autograd, autocast).
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include "ops/common.h"

namespace alore::ops {

template <typename Signature>
auto typed_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// One handle per op, looked up once: at batch 32 a step makes dozens of these calls.
#define ALORE_OP(name, ...)                                            \
  inline const auto& name##_op() {                                     \
    static const auto op = typed_op<__VA_ARGS__>("alore_ext::" #name); \
    return op;                                                         \
  }

using Mask4 = std::array<bool, 4>;
using Mask6 = std::array<bool, 6>;
using Mask8 = std::array<bool, 8>;

ALORE_OP(kron_linear, Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&))
ALORE_OP(kron_linear_backward,
         T4(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, Mask4))
ALORE_OP(alore, Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptTensor&, double))
ALORE_OP(alore_backward, T4(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                            const OptTensor&, double, Mask4))
ALORE_OP(layer_norm_alore,
         std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const OptTensor&, const OptTensor&, double,
                                            const Tensor&, const Tensor&, const Tensor&, const OptTensor&,
                                            double, std::optional<at::ScalarType>))
ALORE_OP(layer_norm_alore_backward,
         T6(const Tensor&, const Tensor&, const OptTensor&, const OptTensor&, const Tensor&, const Tensor&,
            const Tensor&, const Tensor&, const Tensor&, const OptTensor&, double, Mask6, const OptTensor&))
ALORE_OP(add_layer_norm_alore,
         T4(const Tensor&, const Tensor&, const OptTensor&, const OptTensor&, double, const Tensor&,
            const Tensor&, const Tensor&, const OptTensor&, double, std::optional<at::ScalarType>))
ALORE_OP(masked_lora_linear,
         T3(const Tensor&, const Tensor&, const OptTensor&, const Tensor&, const Tensor&, const Tensor&))
ALORE_OP(mlae_linear, T4(const Tensor&, const Tensor&, const OptTensor&, const Tensor&, const Tensor&,
                         const Tensor&, double, bool))
ALORE_OP(masked_lora_linear_backward,
         T6(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
            const OptTensor&, const Tensor&, const Tensor&, Mask6))
ALORE_OP(layer_norm_mlae_linear,
         T7(const Tensor&, const OptTensor&, const OptTensor&, double, const Tensor&, const OptTensor&,
            const Tensor&, const Tensor&, const Tensor&, double, bool))
ALORE_OP(layer_norm_mlae_linear_backward,
         T8(const Tensor&, const OptTensor&, const Tensor&, const OptTensor&, const OptTensor&, double,
            const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
            const Tensor&, const Tensor&, const Tensor&, Mask8))
ALORE_OP(merge_kron_,
         void(const Tensor&, const OptTensor&, const Tensor&, const Tensor&, const Tensor&, std::string_view))
ALORE_OP(merge_lora_, void(const Tensor&, const Tensor&, const Tensor&, const Tensor&))
ALORE_OP(merge_kron_grouped_, void(TensorList, TensorList, at::IntArrayRef, TensorList, TensorList,
                                   TensorList, const Strings&, OptTensorList))
ALORE_OP(merge_lora_grouped_, void(TensorList, TensorList, TensorList, TensorList, OptTensorList))
ALORE_OP(kron_linear_grouped, Tensor(const Tensor&, TensorList, TensorList, TensorList, const Tensor&))
ALORE_OP(alore_grouped, Tensor(const Tensor&, TensorList, TensorList, TensorList, const Tensor&))
ALORE_OP(layer_norm_alore_grouped,
         Tensor(const Tensor&, const OptTensor&, const OptTensor&, double, TensorList, TensorList, TensorList,
                const Tensor&, std::optional<at::ScalarType>))
ALORE_OP(masked_lora_linear_grouped, Tensor(const Tensor&, const Tensor&, const OptTensor&, TensorList,
                                            TensorList, TensorList, const Tensor&))
ALORE_OP(axial_shift, Tensor(const Tensor&, int64_t, int64_t))
ALORE_OP(axial_shift_backward, Tensor(const Tensor&, int64_t, int64_t))
ALORE_OP(axial_shift_pair, std::tuple<Tensor, Tensor>(const Tensor&, int64_t))
ALORE_OP(axial_shift_pair_backward, Tensor(const Tensor&, const Tensor&, int64_t))

#undef ALORE_OP

}  // namespace alore::ops
