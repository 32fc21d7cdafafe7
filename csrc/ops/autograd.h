// What the ops' autograd kernels share.
#pragma once

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "ops/dispatch.h"

namespace alore::ops {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

inline bool requires_grad(const Tensor& t) { return t.defined() && t.requires_grad(); }
inline bool requires_grad(const OptTensor& t) { return t.has_value() && requires_grad(*t); }
inline bool requires_grad(TensorList list) {
  return std::any_of(list.begin(), list.end(), [](const Tensor& t) { return requires_grad(t); });
}

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

// Runs a backward op as a node of its own whose backward raises: the ops have no second derivative, and a
// node stands on every path between the gradients and all that they depend on, so that none can be followed
// past it silently.
class OnceDifferentiable : public torch::autograd::Function<OnceDifferentiable> {
 public:
  // `inputs` are what the gradients depend on; call() returns the defined ones.
  template <typename Call, typename... Inputs>
  static variable_list forward(AutogradContext* ctx, const std::string& op, Call call,
                               const Inputs&... inputs) {
    ctx->saved_data["op"] = op;
    return call();
  }

  static variable_list backward(AutogradContext* ctx, const variable_list&) {
    TORCH_CHECK(false, "alore_ext::", ctx->saved_data["op"].toStringRef(),
                ": double backward is not supported");
  }
};

// grads = call(), below autograd; differentiating them again raises.
template <typename Call, typename... Inputs>
auto once_differentiable(const char* op, Call call, const Inputs&... inputs) {
  using Tuple = decltype(call());
  const auto below = [&] {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return call();
  };
  if (!any_requires_grad(inputs...)) return below();
  Tuple grads;
  const auto run = [&] {
    grads = below();
    variable_list defined;
    std::apply([&](const auto&... g) { ((g.defined() ? defined.push_back(g) : void()), ...); }, grads);
    return defined;
  };
  variable_list marked = OnceDifferentiable::apply(std::string(op), run, inputs...);
  size_t next = 0;
  std::apply([&](auto&... g) { ((g.defined() ? void(g = marked[next++]) : void()), ...); }, grads);
  return grads;
}

}  // namespace alore::ops
