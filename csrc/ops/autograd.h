// What the ops' autograd kernels share.
#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>

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

// Marks first-order gradients so that differentiating them again raises: the backward ops have no derivative
// of their own. The node stands between the gradients and all that they depend on, so no second-order path
// can go around it.
template <typename Tuple, typename... Inputs>
Tuple once_differentiable(const char* op, Tuple grads, const Inputs&... inputs) {
  auto node = std::make_shared<torch::autograd::Error>(
      std::string("alore_ext::") + op + ": double backward is not supported",
      torch::autograd::collect_next_edges(inputs...));
  const auto mark = [&](const Tensor& grad) {
    if (grad.defined()) torch::autograd::set_history(grad, node);
  };
  std::apply([&](const auto&... each) { (mark(each), ...); }, grads);
  return grads;
}

}  // namespace alore::ops
