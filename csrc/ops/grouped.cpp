// The grouped ops composed of ATen's batched products.
#include "ops/grouped.h"

#include <algorithm>
#include <set>
#include <vector>

namespace alore::ops {
namespace {

// Never more than a mark on the device's stream: a bad value raises on the CPU and traps on CUDA.
void assert_index(const char* op, const Tensor& index, int64_t num_adapters) {
  const Tensor in_range = at::eq(index.clamp(-1, num_adapters - 1), index).all();
  at::_assert_async(in_range,
                    std::string(op) + ": index must be in [-1, " + std::to_string(num_adapters) + ")");
}

Tensor padded_to(const Tensor& t, at::IntArrayRef sizes) {
  if (t.sizes() == sizes) return t;
  std::vector<int64_t> pad;
  for (int64_t axis = t.dim() - 1; axis >= 0; --axis) pad.insert(pad.end(), {0, sizes[axis] - t.size(axis)});
  return at::constant_pad_nd(t, pad);
}

// Entry slot[b] of the list for every sample b, in `type`, padded with zeros to the largest entry. Undefined
// entries are zeros.
Tensor gather(const std::vector<Tensor>& list, const Tensor& slot, at::ScalarType type) {
  std::vector<int64_t> sizes;
  at::TensorOptions options;
  for (const Tensor& t : list) {
    if (!t.defined()) continue;
    sizes.resize(t.dim());
    for (int64_t axis = 0; axis < t.dim(); ++axis) sizes[axis] = std::max(sizes[axis], t.size(axis));
    options = t.options().dtype(type);
  }
  std::vector<Tensor> entries;
  for (const Tensor& t : list) {
    entries.push_back(t.defined() ? padded_to(t.to(type), sizes) : at::zeros({}, options).expand(sizes));
  }
  return at::stack(entries).index_select(0, slot);
}

// The Kronecker map of one adapter a sample, all of num_blocks s; x in the accumulate type. Code columns are
// [num_experts, rank], padded alike in down and up.
Tensor batched_kron(const Tensor& x, const Tensor& scale, const Tensor& down, const Tensor& up) {
  const int64_t samples = x.size(0), tokens = x.size(1), experts = scale.size(1), s = scale.size(2),
                p = down.size(2), rank = down.size(3);
  const Tensor flat_down = down.permute({0, 2, 1, 3}).reshape({samples, p, experts * rank});
  const Tensor code = at::bmm(x.view({samples, tokens * s, p}), flat_down);
  const Tensor by_expert = code.view({samples, tokens, s, experts, rank})
                               .permute({0, 3, 2, 1, 4})
                               .reshape({samples * experts, s, tokens * rank});
  const Tensor mixed = at::bmm(scale.transpose(2, 3).reshape({samples * experts, s, s}), by_expert);
  const Tensor by_token = mixed.view({samples, experts, s, tokens, rank})
                              .permute({0, 3, 2, 1, 4})
                              .reshape({samples, tokens * s, experts * rank});
  return at::bmm(by_token, up.reshape({samples, experts * rank, p})).view(x.sizes());
}

}  // namespace

Tensor flatten_samples(const Tensor& x) {
  int64_t tokens = 1;
  for (int64_t axis = 1; axis < x.dim() - 1; ++axis) tokens *= x.size(axis);
  return x.contiguous().view({x.size(0), tokens, x.size(-1)});
}

Tensor compose_kron_grouped(const KronGrouped& call) {
  assert_index(call.op, call.index, call.num_adapters());
  const auto acc = accumulate_type(call.x.scalar_type());
  Tensor base = call.x.to(acc);
  if (call.norm) {
    const auto wide = [&](const OptTensor& t) {
      return t.has_value() && t->defined() ? OptTensor(t->to(acc)) : t;
    };
    base = at::layer_norm(base, {base.size(2)}, wide(call.weight), wide(call.bias), call.eps);
  }
  const Tensor none = at::zeros({}, base.options()), slot = call.index.clamp_min(0);
  Tensor out = call.add_base ? base : none.expand(base.sizes());
  std::set<int64_t> block_counts;
  for (const Tensor& scale : call.scale) block_counts.insert(scale.size(1));
  for (const int64_t s : block_counts) {
    std::vector<Tensor> scale, down, up;
    Tensor chosen = block_counts.size() == 1 ? call.index >= 0 : Tensor();
    for (size_t i = 0; i < call.scale.size(); ++i) {
      const bool fits = call.scale[i].size(1) == s;
      scale.push_back(fits ? call.scale[i] : Tensor());
      down.push_back(fits ? call.down[i] : Tensor());
      up.push_back(fits ? call.up[i] : Tensor());
      if (block_counts.size() == 1 || !fits) continue;
      const Tensor here = call.index == static_cast<int64_t>(i);
      chosen = chosen.defined() ? chosen.logical_or(here) : here;
    }
    const Tensor branch =
        batched_kron(base, gather(scale, slot, acc), gather(down, slot, acc), gather(up, slot, acc));
    // Selected, not multiplied by 0: a value that is not finite stays within its sample.
    out = at::where(chosen.view({-1, 1, 1}), call.add_base ? base + branch : branch, out);
  }
  const Tensor narrow = out.to(call.out_dtype).contiguous();
  return narrow.is_same(call.x) ? narrow.clone() : narrow;
}

Tensor compose_lora_grouped(const LoraGrouped& call) {
  assert_index(call.op, call.index, static_cast<int64_t>(call.lora_a.size()));
  const auto dtype = call.x.scalar_type(), acc = accumulate_type(dtype);
  const Tensor slot = call.index.clamp_min(0);
  Tensor base = at::linear(call.x, call.weight.to(dtype), call.bias);
  const Tensor coeff = gather(call.coeff.vec(), slot, acc).masked_fill((call.index < 0).unsqueeze(1), 0);
  // Exact zeros where nothing is to be added, even under factors that are not finite.
  const Tensor dead = coeff == 0;
  const Tensor a = gather(call.lora_a.vec(), slot, acc).masked_fill(dead.unsqueeze(2), 0);
  const Tensor b =
      (gather(call.lora_b.vec(), slot, acc) * coeff.unsqueeze(1)).masked_fill(dead.unsqueeze(1), 0);
  const Tensor code = at::bmm(call.x, a.to(dtype).transpose(1, 2));
  return base.baddbmm_(code, b.to(dtype).transpose(1, 2)).contiguous();
}

namespace {

// Also what the tests call by this key, to see on any machine what CUDA composes.
struct Composed {
  struct Guard {
    explicit Guard(const Tensor&) {}
    NoAutocast no_autocast;
  };
  static Tensor kron(const KronGrouped& call) { return compose_kron_grouped(call); }
  static Tensor lora(const LoraGrouped& call) { return compose_lora_grouped(call); }
};

}  // namespace
}  // namespace alore::ops

TORCH_LIBRARY_IMPL(alore_ext, CompositeExplicitAutograd, m) {
  alore::ops::register_grouped<alore::ops::Composed>(m);
}
