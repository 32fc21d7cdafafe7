#include <algorithm>
#include <iterator>
#include <sstream>

#include "kernels/lora.h"
#include "kernels/lora_layout.h"

namespace alore::kernels {
namespace {

// The staged kernel for a shape, where one takes it.
void plan_staged(const LoraShape& s, const LoraDevice& device, LoraPlan& plan) {
  if (s.rank > 8 || s.in_features % kChunk != 0 || s.out_features % kChunk != 0) return;
  for (int i = 0; i < static_cast<int>(std::size(kStagedShapes)); ++i) {
    const StagedShape& shape = kStagedShapes[i];
    if (s.out_features > shape.chunks_y * kStagedWarps * kChunk) continue;
    if (s.in_features > shape.chunks_x * kStagedWarps * kChunk) continue;
    const StagedLayout layout(static_cast<int>(s.in_features), static_cast<int>(s.out_features),
                              shape.row_tiles);
    if (static_cast<size_t>(layout.bytes) > device.shared_bytes) continue;
    plan.backward = LoraPath::kStaged;
    plan.staged_shape = i;
    plan.shared_bytes = layout.bytes;
    return;
  }
}

}  // namespace

LoraPlan plan_lora(const LoraShape& s, DType weight, LoraDevice device) {
  LoraPlan plan;
  const bool folds = lora_folds(s.activation, weight);
  const bool fused = device.num_processors > 0 && lora_packs(s);
  plan.code_width = folds ? 0 : lora_code_width(s.activation, s.rank);
  plan.operand_elements = folds ? s.out_features * s.in_features : lora_operand_elements(s);
  // [x | t] costs another write of x and one more step along k; y0 costs a write and a read of y. Counted in
  // bytes at an H200's speeds they break even where both are equally wide.
  const LoraPath side = s.out_features > s.in_features ? LoraPath::kExtended : LoraPath::kFused;
  plan.forward = folds ? LoraPath::kFold : fused ? side : LoraPath::kGemm;
  if (!fused) return plan;

  const int tiles = static_cast<int>(round_up(s.rank, 8) / 8);
  const int64_t units_y = lora_units(s.out_features, tiles), units_x = lora_units(s.in_features, tiles);
  const size_t whole = lora_backward_shared(units_y + units_x, tiles);
  const size_t larger_half = lora_backward_shared(std::max(units_y, units_x), tiles);
  plan_staged(s, device, plan);
  if (plan.backward == LoraPath::kStaged) {
    // As it is.
  } else if (whole <= device.shared_bytes) {
    plan.backward = LoraPath::kFused;
    plan.shared_bytes = whole;
  } else if (larger_half <= device.shared_bytes) {
    plan.backward = LoraPath::kFusedHalf;
    plan.shared_bytes = larger_half;
  } else {
    return plan;
  }
  const int64_t row_tiles = plan.staged_shape < 0 ? 1 : kStagedShapes[plan.staged_shape].row_tiles;
  const int64_t token_tiles = (s.num_tokens + row_tiles * kTileTokens - 1) / (row_tiles * kTileTokens);
  plan.blocks = std::clamp<int64_t>(device.num_processors, 1, std::max<int64_t>(token_tiles, 1));
  plan.workspace_bytes = LoraWorkspace(s, plan.blocks).bytes;
  return plan;
}

std::string LoraPlan::to_string() const {
  std::ostringstream out;
  out << "LoraPlan(forward=" << name_of(forward) << ", backward=" << name_of(backward)
      << ", code_width=" << code_width << ", operand_elements=" << operand_elements;
  if (blocks) {
    out << ", blocks=" << blocks << ", shared_bytes=" << shared_bytes
        << ", workspace_bytes=" << workspace_bytes;
    if (backward == LoraPath::kStaged) out << ", staged_shape=" << staged_shape;
  }
  out << ")";
  return out.str();
}

}  // namespace alore::kernels
