// What the ops' autograd kernels share.
#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>

#include "ops/dispatch.h"

namespace alore::ops {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

inline bool requires_grad(const Tensor& t) { return t.defined() && t.requires_grad(); }
inline bool requires_grad(const OptTensor& t) { return t.has_value() && requires_grad(*t); }

template <typename... Tensors>
bool any_requires_grad(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (requires_grad(tensors) || ...);
}

inline Tensor unwrap(const OptTensor& t) { return t.value_or(Tensor()); }
inline OptTensor wrap(const Tensor& t) { return t.defined() ? OptTensor(t) : std::nullopt; }

// Which gradients this backward must compute. Autograd counts only the tensors that were there, so an absent
// optional argument shifts those behind it: ask in the order of forward's arguments.
class NeededGrads {
 public:
  explicit NeededGrads(AutogradContext* ctx) : ctx_(ctx) {}
  bool next(bool present = true) { return present && ctx_->needs_input_grad(edge_++); }

 private:
  AutogradContext* ctx_;
  size_t edge_ = 0;
};

// Marks first-order gradients so that differentiating them again raises instead of returning zeros: the
// backward ops have no derivative of their own.
template <typename Tuple>
Tuple once_differentiable(const char* op, Tuple grads) {
  std::apply(
      [&](auto&... g) {
        variable_list list{g...};
        auto node = std::make_shared<torch::autograd::DelayedError>(
            std::string("alore_ext::") + op + ": double backward is not supported",
            static_cast<int64_t>(list.size()));
        for (Tensor& t : list) {
          if (t.defined()) t = t.detach().set_requires_grad(true);
        }
        list = (*node)(std::move(list));
        size_t i = 0;
        ((g = list[i++]), ...);
      },
      grads);
  return grads;
}

}  // namespace alore::ops
