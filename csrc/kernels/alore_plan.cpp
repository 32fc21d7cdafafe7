#include <algorithm>
#include <sstream>

#include "kernels/alore.h"
#include "kernels/alore_pipelined_layout.h"

namespace alore::kernels {
namespace {

static_assert(limits_of_build({90, 132, 227 * 1024}, 90).shared_per_block == 227 * 1024);
static_assert(limits_of_build({90, 132, 227 * 1024}, 80).shared_per_block == 163 * 1024);
static_assert(limits_of_build({90, 132, 227 * 1024}, 86).capability == 86);
static_assert(limits_of_build({89, 128, 99 * 1024}, 80).shared_per_block == 99 * 1024);

AdapterDims dims_of(const AloreShape& s) {
  return {static_cast<int>(s.num_blocks), static_cast<int>(s.block_dim), static_cast<int>(s.width())};
}

bool is_half(DType t) { return t == DType::kBFloat16 || t == DType::kFloat16; }

// Why the fused kernels do not take a shape, or null.
const char* refusal(const AloreShape& s, const DeviceLimits& device) {
  if (device.capability < 80) return "needs compute capability 8.0 (16-bit tensor core instructions)";
  if (!is_half(s.output)) return "activations are not 16-bit";
  if (s.input != s.output && !(s.norm && s.input == DType::kFloat32))
    return "mixed activation types without a norm";
  if (s.block_dim % 8 != 0) return "embed_dim / num_experts is not a multiple of 8";
  if (s.num_blocks > kMaxBlocks) return "more than 8 blocks a token";
  if (s.width() > kMaxCodeWidth) return "num_experts * rank above 64";
  if (s.embed_dim() > 2048) return "embed_dim above 2048";
  return nullptr;
}

int clamp_int(int64_t v, int low, int high) { return static_cast<int>(std::clamp<int64_t>(v, low, high)); }

// The least padding first, then the fewest warps a tile: they meet at barriers.
bool choose_groups(const AloreShape& s, const AdapterDims& d, AloreForwardPlan& plan) {
  const bool wide = s.input == DType::kFloat32;
  int best_waste = -1;
  for (int groups : {6, 8, 4}) {
    if (wide && groups == 8) continue;  // fp32 rows would not fit the registers
    const int warps = ceil_div(d.groups, groups);
    if (warps > std::min(8, forward_warps(groups, wide, s.norm).of_block)) continue;
    const int waste = warps * groups - d.groups;
    if (best_waste >= 0 && waste >= best_waste) continue;
    best_waste = waste;
    plan.groups_per_warp = groups;
    plan.warps_per_tile = warps;
  }
  return best_waste >= 0;
}

// The shape among `shapes` that the pipelined kernels take s in, or null.
template <size_t kCount>
const PipelinedShape* pipelined_shape(const AloreShape& s, const PipelinedShape (&shapes)[kCount]) {
  if (s.num_tokens == 0 || s.num_blocks != kPipelinedBlocks || s.width() > kCodeTile || s.input != s.output ||
      s.dropout || s.residual || (s.norm && !s.add_base))
    return nullptr;
  const auto* found = std::ranges::find(shapes, s.embed_dim(), [](const PipelinedShape& shape) {
    return static_cast<int64_t>(shape.groups) * kGroupColumns;
  });
  return found == std::end(shapes) ? nullptr : found;
}

bool plan_pipelined(const AloreShape& s, const DeviceLimits& device, AloreForwardPlan& plan) {
  const PipelinedShape* shape = pipelined_shape(s, kPipelinedForward);
  if (shape == nullptr) return false;
  const PipelinedForwardLayout layout(*shape, s.norm);
  if (layout.bytes > device.shared_per_block) return false;
  plan.pipelined = plan.fused = plan.even = true;
  plan.groups_per_warp = shape->items;
  plan.warps_per_tile = layout.warps;
  plan.tiles_per_block = shape->teams;
  const int64_t rows = int64_t{layout.rows} * shape->teams;
  plan.blocks = clamp_int((s.num_tokens + rows - 1) / rows, 1, device.num_sms);
  plan.shared_bytes = layout.bytes;
  plan.overlaps_launches = device.capability >= 90;
  return true;
}

// R = rstd * dZ, which the backward behind a norm rounds, needs bf16's range.
bool plan_pipelined(const AloreShape& s, const DeviceLimits& device, AloreBackwardPlan& plan) {
  const PipelinedShape* shape = pipelined_shape(s, kPipelinedBackward);
  if (shape == nullptr || (s.norm && s.output != DType::kBFloat16)) return false;
  const PipelinedBackwardLayout layout(*shape, s.norm);
  if (layout.bytes > device.shared_per_block) return false;
  plan.pipelined = plan.fused = true;
  plan.warps = layout.warps;
  plan.row_tiles = plan.parts = shape->row_tiles;
  plan.stages = kPipelinedStages;
  plan.key_splits = layout.splits;
  plan.items_per_warp = shape->items;
  plan.blocks = clamp_int((s.num_tokens + layout.rows - 1) / layout.rows, 1, device.num_sms);
  plan.shared_bytes = layout.bytes;
  return true;
}

int64_t partial_sum_bytes(const AloreShape& s, int blocks) {
  return blocks * (s.scale_size() + 2 * s.down_size()) * 4;
}

}  // namespace

AloreForwardPlan plan_alore_forward(const AloreShape& s, const DeviceLimits& device) {
  AloreForwardPlan plan;
  if (const char* why = refusal(s, device)) {
    plan.reason = why;
    return plan;
  }
  if (plan_pipelined(s, device, plan)) return plan;
  const AdapterDims d = dims_of(s);
  if (!choose_groups(s, d, plan)) {
    plan.reason = "a row does not fit the registers of 8 warps";
    return plan;
  }
  const int64_t tiles = (s.num_tokens + kTileRows - 1) / kTileRows;
  plan.even = s.block_dim % kGroupColumns == 0 && plan.warps_per_tile * plan.groups_per_warp == d.groups;
  const ForwardWarps most = forward_warps(plan.groups_per_warp, s.input == DType::kFloat32, s.norm);
  for (plan.tiles_per_block = std::max(1, most.of_block / plan.warps_per_tile);; --plan.tiles_per_block) {
    plan.shared_bytes = ForwardLayout(d, plan.groups_per_warp, plan.warps_per_tile, plan.tiles_per_block,
                                      s.norm, s.input == DType::kFloat32)
                            .bytes;
    if (plan.shared_bytes <= device.shared_per_block) break;
    if (plan.tiles_per_block == 1) {
      plan.reason = "factors do not fit shared memory";
      return plan;
    }
  }
  const int threads = 32 * plan.warps_per_tile * plan.tiles_per_block;
  const int by_registers = std::max(1, most.blocks * most.of_block * 32 / threads);
  const int by_shared =
      std::max<int>(1, static_cast<int>((device.shared_per_block + 1024) / (plan.shared_bytes + 1024)));
  const int resident = device.num_sms * std::min(by_registers, by_shared);
  plan.blocks = clamp_int((tiles + plan.tiles_per_block - 1) / plan.tiles_per_block, 1, resident);
  plan.fused = true;
  return plan;
}

AloreBackwardPlan plan_alore_backward(const AloreShape& s, const DeviceLimits& device) {
  AloreBackwardPlan plan;
  if (const char* why = refusal(s, device)) {
    plan.reason = why;
    return plan;
  }
  const AdapterDims d = dims_of(s);
  plan.overlaps_launches = device.capability >= 90;
  if (plan_pipelined(s, device, plan)) {
    plan.workspace_bytes = partial_sum_bytes(s, plan.blocks);
    return plan;
  }
  if (d.padded_width == 48) {
    plan.reason = "num_experts * rank between 33 and 48";  // threads are dealt out in powers of two
    return plan;
  }
  const int items = d.groups_per_block * d.code_tiles;
  const bool many_blocks = d.num_blocks > 4;  // the mixing's gradient then takes 64 registers a thread
  // 12 warps where that splits the work evenly (block_dim 96, 192, 384), else 8.
  plan.warps =
      !many_blocks && (items > 8 || 12 % items == 0) && items != 1 && items != 2 && items != 4 ? 12 : 8;
  plan.items_per_warp = ceil_div(items, plan.warps);
  if (plan.items_per_warp > (many_blocks ? 1 : 2)) {
    plan.reason = "factor gradients do not fit the registers of a block";
    return plan;
  }
  const bool wide = s.input == DType::kFloat32;
  const int64_t tiles = (s.num_tokens + kTileRows - 1) / kTileRows;
  plan.row_tiles = std::max(1, 1024 / static_cast<int>(s.embed_dim()));
  plan.row_tiles = plan.row_tiles >= 8 ? 8 : plan.row_tiles >= 4 ? 4 : plan.row_tiles >= 2 ? 2 : 1;
  // Few tokens: rather more blocks at work than more tokens a block.
  while (plan.row_tiles > 1 && tiles / plan.row_tiles < device.num_sms) plan.row_tiles /= 2;
  const auto fits = [&](int stages) {
    plan.stages = stages;
    plan.shared_bytes =
        BackwardLayout(d, 32 * plan.warps, plan.row_tiles, plan.stages, plan.key_splits, s.norm, wide).bytes;
    return plan.shared_bytes <= device.shared_per_block;
  };
  // A second stage, which hides the loads, before anything else; then more tokens at a time; then more warps
  // a code.
  const auto choose = [&](int least_stages) {
    for (int row_tiles = plan.row_tiles; row_tiles >= 1; row_tiles /= 2) {
      const int most = clamp_int(plan.warps / (row_tiles * d.num_blocks), 1, d.groups_per_block);
      for (plan.key_splits = most; plan.key_splits >= 1; --plan.key_splits) {
        const int wanted = plan.row_tiles;
        plan.row_tiles = row_tiles;
        for (int stages = kMaxStages; stages >= least_stages; --stages) {
          if (fits(stages)) return true;
        }
        plan.row_tiles = wanted;
      }
    }
    return false;
  };
  if (!choose(2) && !choose(1)) {
    plan.reason = "a tile of 16 tokens does not fit shared memory";
    return plan;
  }
  plan.parts = plan.items_per_warp > 1 ? 1 : std::min(plan.warps / items, plan.row_tiles * d.num_blocks);
  plan.blocks = clamp_int((tiles + plan.row_tiles - 1) / plan.row_tiles, 1, device.num_sms);
  plan.workspace_bytes = partial_sum_bytes(s, plan.blocks);
  plan.fused = true;
  return plan;
}

std::string AloreForwardPlan::to_string() const {
  std::ostringstream out;
  if (!fused) {
    out << "AloreForwardPlan(path=general, reason=" << reason << ")";
  } else {
    out << "AloreForwardPlan(path=fused, pipelined=" << (pipelined ? "true" : "false")
        << ", blocks=" << blocks << ", tiles_per_block=" << tiles_per_block
        << ", warps_per_tile=" << warps_per_tile << ", groups_per_warp=" << groups_per_warp
        << ", even=" << (even ? "true" : "false") << ", shared_bytes=" << shared_bytes
        << ", overlaps_launches=" << (overlaps_launches ? "true" : "false") << ")";
  }
  return out.str();
}

std::string AloreBackwardPlan::to_string() const {
  std::ostringstream out;
  if (!fused) {
    out << "AloreBackwardPlan(path=general, reason=" << reason << ")";
  } else {
    out << "AloreBackwardPlan(path=fused, pipelined=" << (pipelined ? "true" : "false")
        << ", blocks=" << blocks << ", warps=" << warps << ", row_tiles=" << row_tiles
        << ", stages=" << stages << ", key_splits=" << key_splits << ", items_per_warp=" << items_per_warp
        << ", parts=" << parts << ", shared_bytes=" << shared_bytes << ", workspace_bytes=" << workspace_bytes
        << ", overlaps_launches=" << (overlaps_launches ? "true" : "false") << ")";
  }
  return out.str();
}

}  // namespace alore::kernels
