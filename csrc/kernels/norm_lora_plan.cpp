#include <algorithm>
#include <sstream>

#include "kernels/norm_lora.h"
#include "kernels/norm_lora_layout.h"

namespace alore::kernels {
namespace {

template <size_t kCount>
const PipelinedShape* shape_of_width(int64_t width, const PipelinedShape (&shapes)[kCount]) {
  const auto* found = std::ranges::find(
      shapes, width, [](const PipelinedShape& s) { return int64_t{s.groups} * kGroupColumns; });
  return found == std::end(shapes) ? nullptr : found;
}

int blocks_of(int64_t num_tokens, int rows, const DeviceLimits& device) {
  return static_cast<int>(std::clamp<int64_t>((num_tokens + rows - 1) / rows, 1, device.num_sms));
}

}  // namespace

NormLoraPlan plan_norm_lora(const NormLoraShape& shape, const DeviceLimits& device) {
  const LoraShape& s = shape.linear;
  NormLoraPlan plan;
  const auto refuse = [&](const char* reason) {
    plan.reason = reason;
    return plan;
  };
  if (device.capability < 80)
    return refuse("needs compute capability 8.0 (bfloat16 tensor core instructions)");
  if (s.activation != DType::kBFloat16 || shape.weight != DType::kBFloat16)
    return refuse("activations and weight are not bfloat16");
  if (s.rank > kCodeColumns) return refuse("more than 8 rank rows");
  const auto* forward = shape_of_width(s.in_features, kPipelinedForward);
  const auto* backward = shape_of_width(s.in_features, kPipelinedBackward);
  if (forward == nullptr || backward == nullptr)
    return refuse("in_features is not 128, 256, 384, 512 or 768");
  plan.linear = plan_lora(s, shape.weight, {device.num_sms, static_cast<size_t>(device.shared_per_block)});
  if (plan.linear.backward != LoraPath::kStaged || norm_lora_padding(s, shape.weight) == 0)
    return refuse("no staged backward takes out_features (multiples of 32 up to 2304)");
  const NormLoraForwardLayout forward_layout(*forward);
  const NormLoraBackwardLayout backward_layout(*backward);
  if (std::max(forward_layout.bytes, backward_layout.bytes) > device.shared_per_block)
    return refuse("the tiles do not fit a block's shared memory");
  plan.fused = true;
  plan.forward_blocks = device.num_sms;  // they copy W as well
  plan.forward_shared_bytes = forward_layout.bytes;
  plan.backward_blocks = blocks_of(s.num_tokens, backward_layout.rows, device);
  plan.backward_shared_bytes = backward_layout.bytes;
  plan.overlaps_launches = device.capability >= 90;
  plan.workspace_bytes =
      plan.linear.workspace_bytes + static_cast<size_t>(plan.backward_blocks * s.rank * s.in_features) * 4;
  return plan;
}

std::string NormLoraPlan::to_string() const {
  std::ostringstream out;
  if (!fused) {
    out << "NormLoraPlan(fused=False, reason='" << reason << "')";
    return out.str();
  }
  out << "NormLoraPlan(fused=True, linear=" << linear.to_string() << ", forward_blocks=" << forward_blocks
      << ", forward_shared_bytes=" << forward_shared_bytes << ", backward_blocks=" << backward_blocks
      << ", backward_shared_bytes=" << backward_shared_bytes
      << ", overlaps_launches=" << (overlaps_launches ? "True" : "False")
      << ", workspace_bytes=" << workspace_bytes << ")";
  return out.str();
}

}  // namespace alore::kernels
