// Merges on CUDA: one launch for all targets of a dtype that the kernel takes, ATen for the others.
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <array>
#include <limits>

#include "kernels/merge.h"
#include "ops/backend.h"
#include "ops/merge.h"

namespace alore::ops {
namespace {

using kernels::DType;
using kernels::MergeFactor;

int32_t narrow(int64_t stride) {
  TORCH_INTERNAL_ASSERT(stride <= std::numeric_limits<int32_t>::max());  // plan_merge bounds the factors
  return static_cast<int32_t>(stride);
}

MergeFactor factor_view(const Tensor& t, int64_t stride_e, int64_t stride_x, int64_t stride_k) {
  return {t.const_data_ptr(), narrow(stride_e), narrow(stride_x), narrow(stride_k)};
}

kernels::MergeShape merge_shape(const MergeTarget& t) {
  kernels::MergeShape s;
  s.num_tokens = t.tokens.size(0);
  s.target = kernel_dtype(t.tokens.scalar_type());
  s.factor = kernel_dtype(t.first.scalar_type());
  s.token_stride = t.tokens.stride(0);
  s.element_stride = t.tokens.stride(1);
  if (t.map == MergeTarget::Map::kLowRank) {
    s.low_rank = true;
    s.p_out = t.tokens.size(1);
    s.rank = t.third.size(0);
    return s;
  }
  s.num_experts = t.first.size(0);
  s.s_in = t.first.size(t.transposed ? 2 : 1);
  s.s_out = t.first.size(t.transposed ? 1 : 2);
  s.p_in = t.transposed ? t.third.size(2) : t.second.size(1);
  s.p_out = t.transposed ? t.second.size(1) : t.third.size(2);
  s.rank = t.second.size(2);
  return s;
}

// The entry of a target whose factors are contiguous and whose source has the strides of its tokens: scale
// [E, s_in, s_out], down [E, p_in, r], up [E, r, p_out], in the adapter's own orientation; or coeff [R],
// lora_b [out, R], lora_a [R, in].
kernels::MergeEntry merge_entry(const MergeTarget& t, const kernels::MergeShape& s,
                                const kernels::MergePlan& plan) {
  const kernels::MergeMemory memory{t.tokens.mutable_data_ptr(), t.source.const_data_ptr()};
  if (s.low_rank) {
    return kernels::merge_entry(s, plan, memory, factor_view(t.second, 0, s.rank, 1),
                                factor_view(t.third, 0, 1, s.p_out), factor_view(t.first, 0, 0, 1));
  }
  const int64_t columns = t.first.size(2), p_in = t.second.size(1), p_out = t.third.size(2);
  const MergeFactor down = factor_view(t.second, p_in * s.rank, s.rank, 1);
  const MergeFactor up = factor_view(t.third, s.rank * p_out, 1, p_out);
  const int64_t expert = t.first.size(1) * columns;
  return t.transposed
             ? kernels::merge_entry(s, plan, memory, up, down, factor_view(t.first, expert, 1, columns))
             : kernels::merge_entry(s, plan, memory, down, up, factor_view(t.first, expert, columns, 1));
}

constexpr std::array kTargetTypes{DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};

void make_contiguous(Tensor& t) {
  if (!t.is_contiguous()) t = t.contiguous();
}

}  // namespace

void launch_merges(MergeTargets targets) {
  if (targets.empty()) return;
  const c10::cuda::CUDAGuard device(targets[0].tokens.device());
  const size_t shared_limit = at::cuda::getCurrentDeviceProperties()->sharedMemPerBlockOptin;
  std::array<std::vector<kernels::PlannedMerge>, kTargetTypes.size()> planned;
  for (MergeTarget& target : targets) {  // they live until the launch: entries point into their tensors
    match_layout(target);
    const auto shape = merge_shape(target);
    const auto plan = kernels::plan_merge(shape, shared_limit);
    if (!plan.taken) {
      compose_merge(target);
      continue;
    }
    make_contiguous(target.first);
    make_contiguous(target.second);
    make_contiguous(target.third);
    const auto type = std::find(kTargetTypes.begin(), kTargetTypes.end(), shape.target);
    planned[type - kTargetTypes.begin()].push_back({merge_entry(target, shape, plan), plan});
  }
  const auto stream = at::cuda::getCurrentCUDAStream().stream();
  for (size_t i = 0; i < kTargetTypes.size(); ++i) {
    kernels::merge_grouped({stream, nullptr}, kTargetTypes[i], planned[i].data(),
                           static_cast<int64_t>(planned[i].size()));
  }
  // The kernels write through raw pointers. Outside inference mode the autograd kernels above count the
  // change.
  if (!c10::InferenceMode::is_enabled()) return;
  for (const MergeTarget& target : targets) {
    if (!target.tokens.is_inference()) target.tokens.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace alore::ops
