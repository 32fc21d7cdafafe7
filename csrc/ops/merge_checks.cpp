// Checks of the grouped merges: each entry as the single op checks it, then what entries must not do to each
// other. They come before the first write.
#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "ops/merge.h"

namespace alore::ops {
namespace {

void check_length(const char* op, const char* name, size_t got, size_t expected) {
  TORCH_CHECK(got == expected, op, ": ", name, " must have as many entries as weight, ", expected, ", got ",
              got);
}

// The bytes between a tensor's first element and its last, counted from `base`.
struct Extent {
  const void* base;
  uintptr_t begin, end;
  const char* list;  // the tensor is entry `index` of it
  size_t index;

  std::string name() const { return std::string(list) + "[" + std::to_string(index) + "]"; }
};

// Where an address is to be had, extents of all tensors are on one scale. A tensor without data (Meta) can
// only be compared within its storage.
void add_extent(std::vector<Extent>& extents, const Tensor& t, const char* list, size_t index) {
  if (t.unsafeGetTensorImpl()->has_symbolic_sizes_strides() || t.numel() == 0 || !t.has_storage()) return;
  int64_t last = 0;
  for (int64_t axis = 0; axis < t.dim(); ++axis) last += (t.size(axis) - 1) * t.stride(axis);
  const auto item = static_cast<int64_t>(t.element_size());
  const bool placed = t.device().type() != at::kMeta;
  const void* base = placed ? nullptr : t.storage().unsafeGetStorageImpl();
  const auto begin = placed ? reinterpret_cast<uintptr_t>(t.const_data_ptr())
                            : static_cast<uintptr_t>(t.storage_offset() * item);
  extents.push_back({base, begin, begin + static_cast<uintptr_t>((last + 1) * item), list, index});
}

// Sorts them.
void check_disjoint(const char* op, std::vector<Extent>& extents) {
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) {
    return std::tie(a.base, a.begin) < std::tie(b.base, b.begin);
  });
  for (size_t i = 1; i < extents.size(); ++i) {
    // The extents so far are disjoint, so the one before ends last.
    const Extent &a = extents[i - 1], &b = extents[i];
    TORCH_CHECK(a.base != b.base || a.end <= b.begin, op, ": ", std::min(a.name(), b.name()), " and ",
                std::max(a.name(), b.name()),
                " share memory, or lie within each other's; entries are merged in no order, so merge them "
                "in calls of their own");
  }
}

void check_bias_of(const char* op, size_t entries, TensorList bias, at::IntArrayRef bias_of) {
  TORCH_CHECK(bias_of.size() == bias.size(), op, ": bias_of must name an entry for each bias, ", bias.size(),
              ", got ", bias_of.size());
  for (size_t j = 0; j < bias_of.size(); ++j) {
    TORCH_CHECK(bias_of[j] >= (j == 0 ? 0 : bias_of[j - 1] + 1) && bias_of[j] < static_cast<int64_t>(entries),
                op, ": bias_of must rise within [0, ", entries, "), got ", bias_of);
  }
}

void check_devices(const char* op, TensorList weight) {
  for (size_t i = 1; i < weight.size(); ++i) {
    TORCH_CHECK(weight[i].device() == weight[0].device(), OpName(op, "entry", i), ": weight must be on ",
                weight[0].device(), " as entry 0's is, got ", weight[i].device());
  }
}

void check_source(const OpName& op, const Tensor& source, const Tensor& weight) {
  TORCH_CHECK(source.sym_sizes() == weight.sym_sizes(), op, ": source must have weight's shape ",
              weight.sym_sizes(), ", got ", source.sym_sizes());
  TORCH_CHECK(source.scalar_type() == weight.scalar_type(), op, ": source must have weight's dtype ",
              weight.scalar_type(), ", got ", source.scalar_type());
  TORCH_CHECK(source.device() == weight.device(), op, ": source must be on weight's device ", weight.device(),
              ", got ", source.device());
  TORCH_CHECK(source.layout() == at::kStrided, op, ": source must be a dense tensor, got layout ",
              source.layout());
}

// Sources may share memory with each other, but not with what is written: `written` is disjoint and sorted.
void check_sources(const char* op, TensorList weight, OptTensorList source,
                   const std::vector<Extent>& written) {
  if (!source.has_value()) return;
  std::vector<Extent> read;
  for (size_t i = 0; i < source->size(); ++i) {
    check_source({op, "entry", i}, (*source)[i], weight[i]);
    add_extent(read, (*source)[i], "source", i);
  }
  for (const Extent& s : read) {
    const auto other = std::partition_point(written.begin(), written.end(), [&](const Extent& w) {
      return std::tie(w.base, w.end) <= std::tie(s.base, s.begin);
    });
    const bool apart = other == written.end() || other->base != s.base || other->begin >= s.end;
    TORCH_CHECK(apart, OpName(op, "entry", s.index), ": source must not share memory with ", other->name(),
                ", which is written; leave source out to merge in place");
  }
}

}  // namespace

std::vector<OptTensor> bias_by_entry(size_t entries, TensorList bias, at::IntArrayRef bias_of) {
  std::vector<OptTensor> biases(entries);
  for (size_t j = 0; j < bias_of.size(); ++j) biases[bias_of[j]] = bias[j];
  return biases;
}

void check_merge_kron_grouped(TensorList weight, TensorList bias, at::IntArrayRef bias_of, TensorList scale,
                              TensorList down, TensorList up, const Strings& side, OptTensorList source) {
  constexpr const char* op = "merge_kron_grouped_";
  check_bias_of(op, weight.size(), bias, bias_of);
  check_length(op, "scale", scale.size(), weight.size());
  check_length(op, "down", down.size(), weight.size());
  check_length(op, "up", up.size(), weight.size());
  check_length(op, "side", side.size(), weight.size());
  if (source.has_value()) check_length(op, "source", source->size(), weight.size());
  const std::vector<OptTensor> biases = bias_by_entry(weight.size(), bias, bias_of);
  std::vector<Extent> written;
  written.reserve(weight.size() + bias.size());
  for (size_t i = 0; i < weight.size(); ++i) {
    const OptTensor& b = biases[i];
    const std::string s = side.get(i);
    check_merge_kron({op, "entry", i}, weight[i], b, scale[i], down[i], up[i], s);
    add_extent(written, weight[i], "weight", i);
    if (s == "after" && b.has_value()) add_extent(written, *b, "bias", i);
  }
  check_devices(op, weight);
  check_disjoint(op, written);
  check_sources(op, weight, source, written);
}

void check_merge_lora_grouped(TensorList weight, TensorList lora_a, TensorList lora_b, TensorList coeff,
                              OptTensorList source) {
  constexpr const char* op = "merge_lora_grouped_";
  check_length(op, "lora_a", lora_a.size(), weight.size());
  check_length(op, "lora_b", lora_b.size(), weight.size());
  check_length(op, "coeff", coeff.size(), weight.size());
  if (source.has_value()) check_length(op, "source", source->size(), weight.size());
  std::vector<Extent> written;
  written.reserve(weight.size());
  for (size_t i = 0; i < weight.size(); ++i) {
    check_merge_lora({op, "entry", i}, weight[i], lora_a[i], lora_b[i], coeff[i]);
    add_extent(written, weight[i], "weight", i);
  }
  check_devices(op, weight);
  check_disjoint(op, written);
  check_sources(op, weight, source, written);
}

}  // namespace alore::ops
