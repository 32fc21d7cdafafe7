// Merging into weights: products in float32 (float64 for float64), one rounding at the end. What is here
// serves every device; merge_cuda.cpp has the grouped launch.
#include "ops/merge.h"

#include <ATen/Context.h>

#include "ops/backend.h"
#include "ops/dispatch.h"

namespace alore::ops {

void add_kron(MergeTargets& targets, const Tensor& weight, const Tensor& source, const OptTensor& bias,
              const Tensor& scale, const Tensor& down, const Tensor& up, std::string_view side) {
  const auto add = [&](const Tensor& tokens, const Tensor& from, bool transposed) {
    if (tokens.numel() > 0) {
      targets.push_back({MergeTarget::Map::kKron, tokens, from, scale, down, up, transposed});
    }
  };
  if (side == "before") return add(weight, source, true);
  const Tensor columns = weight.t();
  add(columns, source.is_same(weight) ? columns : source.t(), false);
  if (bias.has_value() && bias->defined()) {
    const Tensor row = bias->unsqueeze(0);
    add(row, row, false);
  }
}

void add_lora(MergeTargets& targets, const Tensor& weight, const Tensor& source, const Tensor& lora_a,
              const Tensor& lora_b, const Tensor& coeff) {
  targets.push_back({MergeTarget::Map::kLowRank, weight, source, coeff, lora_b, lora_a});
}

at::ScalarType merge_type(const Tensor& target, const Tensor& factor) {
  return at::promote_types(accumulate_type(target.scalar_type()), accumulate_type(factor.scalar_type()));
}

void match_layout(MergeTarget& t) {
  if (t.source.strides() == t.tokens.strides()) return;
  t.tokens.copy_(t.source);
  t.source = t.tokens;
}

void compose_merge(const MergeTarget& t) {
  const at::NoTF32Guard exact;
  const NoAutocast no_autocast;
  const auto acc = merge_type(t.tokens, t.first);
  const Tensor tokens = t.source.to(acc), first = t.first.to(acc), second = t.second.to(acc),
               third = t.third.to(acc);
  if (t.map == MergeTarget::Map::kLowRank) {
    t.tokens.copy_(at::addmm(tokens, second * first, third));
  } else if (t.transposed) {
    t.tokens.copy_(tokens + kron_linear_op().call(tokens, first.transpose(1, 2), third.transpose(1, 2),
                                                  second.transpose(1, 2)));
  } else {
    t.tokens.copy_(tokens + kron_linear_op().call(tokens, first, second, third));
  }
}

void compose_merges(MergeTargets targets) {
  for (MergeTarget& target : targets) {
    match_layout(target);
    compose_merge(target);
  }
}

}  // namespace alore::ops
