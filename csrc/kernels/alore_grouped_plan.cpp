#include <algorithm>

#include "kernels/alore_grouped.h"
#include "kernels/alore_grouped_layout.h"

namespace alore::kernels {

AloreGroupedPlan plan_alore_grouped(int64_t num_samples, std::span<const AloreShape> shapes,
                                    const DeviceLimits& device) {
  AloreGroupedPlan plan;
  for (size_t i = 0; i < shapes.size(); ++i) {
    const AloreShape& s = shapes[i];
    plan.refused = static_cast<int64_t>(i);
    const auto single = plan_alore_forward(s, device);
    if (!single.fused) {
      plan.reason = single.reason;
      return plan;
    }
    const AdapterDims d(static_cast<int>(s.num_blocks), static_cast<int>(s.block_dim),
                        static_cast<int>(s.width()));
    const GroupedLayout common(d.embed_dim, s.norm);
    plan.shared_bytes = std::max(plan.shared_bytes, GroupedAdapterLayout(common, d).bytes);
    if (plan.shared_bytes > device.shared_per_block) {
      plan.reason = "factors do not fit shared memory";
      return plan;
    }
  }
  // A block loads its sample's factors before its first tile: no more blocks a sample than keep the device
  // busy.
  const int64_t resident =
      std::clamp<int64_t>((device.shared_per_block + 1024) / (plan.shared_bytes + 1024), 1, 4) *
      device.num_sms;
  const int64_t samples = std::max<int64_t>(num_samples, 1), tokens = shapes.front().num_tokens / samples;
  const int64_t tiles = (tokens + kTileRows - 1) / kTileRows;
  plan.blocks_per_sample =
      std::clamp<int64_t>((resident + samples - 1) / samples, 1, std::max<int64_t>(tiles, 1));
  plan.fused = true;
  return plan;
}

}  // namespace alore::kernels
