// In-place merges between their checks and what runs them: the whole call as a list of targets, so that one
// layer and a model take the same way.
#pragma once

#include "ops/common.h"

namespace alore::ops {

// One matrix to rewrite, seen as rows that a map acts on: tokens <- tokens + tokens @ W' for a Kronecker map
// (of its transpose, where `transposed`), tokens <- tokens + lora_b diag(coeff) lora_a for a low-rank one.
struct MergeTarget {
  enum class Map { kKron, kLowRank };
  Map map;
  Tensor tokens;  // [num_tokens, width], a view that is written through
  Tensor source;  // what the tokens are before the merge: themselves, or others of that shape and dtype
  Tensor first;   // kKron: scale; kLowRank: coeff
  Tensor second;  // kKron: down; kLowRank: lora_b
  Tensor third;   // kKron: up; kLowRank: lora_a
  bool transposed = false;
};

using MergeTargets = std::vector<MergeTarget>;

// Runs checked targets that share a device and write no memory that another reads or writes.
using MergeRunner = void (*)(MergeTargets);

// Copies a source that is laid out unlike its tokens, whose merge is then in place: rare, and worth no second
// set of strides. Every merge from a source has the bits of one in place.
void match_layout(MergeTarget& target);

// From ATen's products and kron_linear, one target after the other, on any device.
void compose_merge(const MergeTarget& target);
void compose_merges(MergeTargets targets);

// merge_cuda.cpp: grouped launches; what the kernel does not take is composed.
void launch_merges(MergeTargets targets);

// float64 where the target or a factor is, else float32: what products and sums are taken in.
at::ScalarType merge_type(const Tensor& target, const Tensor& factor);

// Each entry's bias, or none; for checked arguments.
std::vector<OptTensor> bias_by_entry(size_t entries, TensorList bias, at::IntArrayRef bias_of);

// The checks of a group, every entry's and then those between them. Errors name the entry.
void check_merge_kron_grouped(TensorList weight, TensorList bias, at::IntArrayRef bias_of, TensorList scale,
                              TensorList down, TensorList up, const Strings& side, OptTensorList source);
void check_merge_lora_grouped(TensorList weight, TensorList lora_a, TensorList lora_b, TensorList coeff,
                              OptTensorList source);

// What one layer's merge rewrites: weight <- the merge of source, which may be weight itself. before: W (I +
// W')^T, whose tokens are the rows of W. after: (I + W')^T W and, in place, b (I + W'), whose tokens are the
// columns of W, and the bias.
void add_kron(MergeTargets& targets, const Tensor& weight, const Tensor& source, const OptTensor& bias,
              const Tensor& scale, const Tensor& down, const Tensor& up, std::string_view side);
void add_lora(MergeTargets& targets, const Tensor& weight, const Tensor& source, const Tensor& lora_a,
              const Tensor& lora_b, const Tensor& coeff);

// ---- The ops ----------------------------------------------------------------------------------------------

template <MergeRunner run>
void merge_kron_(const Tensor& weight, const OptTensor& bias, const Tensor& scale, const Tensor& down,
                 const Tensor& up, std::string_view side) {
  check_merge_kron("merge_kron_", weight, bias, scale, down, up, side);
  MergeTargets targets;
  add_kron(targets, weight, weight, bias, scale, down, up, side);
  run(std::move(targets));
}

template <MergeRunner run>
void merge_lora_(const Tensor& weight, const Tensor& lora_a, const Tensor& lora_b, const Tensor& coeff) {
  check_merge_lora("merge_lora_", weight, lora_a, lora_b, coeff);
  MergeTargets targets;
  add_lora(targets, weight, weight, lora_a, lora_b, coeff);
  run(std::move(targets));
}

template <MergeRunner run>
void merge_kron_grouped_(TensorList weight, TensorList bias, at::IntArrayRef bias_of, TensorList scale,
                         TensorList down, TensorList up, const Strings& side, OptTensorList source) {
  check_merge_kron_grouped(weight, bias, bias_of, scale, down, up, side, source);
  const std::vector<OptTensor> biases = bias_by_entry(weight.size(), bias, bias_of);
  const TensorList sources = source.value_or(weight);
  MergeTargets targets;
  targets.reserve(weight.size() + bias.size());
  for (size_t i = 0; i < weight.size(); ++i) {
    add_kron(targets, weight[i], sources[i], biases[i], scale[i], down[i], up[i], side.get(i));
  }
  run(std::move(targets));
}

template <MergeRunner run>
void merge_lora_grouped_(TensorList weight, TensorList lora_a, TensorList lora_b, TensorList coeff,
                         OptTensorList source) {
  check_merge_lora_grouped(weight, lora_a, lora_b, coeff, source);
  const TensorList sources = source.value_or(weight);
  MergeTargets targets;
  targets.reserve(weight.size());
  for (size_t i = 0; i < weight.size(); ++i) {
    add_lora(targets, weight[i], sources[i], lora_a[i], lora_b[i], coeff[i]);
  }
  run(std::move(targets));
}

// Under the current dispatch key.
template <MergeRunner run>
void register_merges(torch::Library& m) {
  m.impl("merge_kron_", merge_kron_<run>);
  m.impl("merge_lora_", merge_lora_<run>);
  m.impl("merge_kron_grouped_", merge_kron_grouped_<run>);
  m.impl("merge_lora_grouped_", merge_lora_grouped_<run>);
}

}  // namespace alore::ops
