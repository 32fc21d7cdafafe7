#include <algorithm>
#include <limits>
#include <sstream>

#include "kernels/lora_grouped.h"

namespace alore::kernels {
namespace {

const char* refusal(const LoraShape& s) {
  if (!is_16bit(s.activation)) return "activations that are not 16-bit";
  if (s.in_features % 8 != 0 || s.out_features % 8 != 0) return "features that are no multiple of 8";
  if (s.rank > kMaxGroupedRank) return "more than 64 rank rows";
  return nullptr;
}

}  // namespace

LoraGroupedPlan plan_lora_grouped(int64_t num_samples, std::span<const LoraShape> shapes) {
  LoraGroupedPlan plan;
  int64_t vectors = 0, rank = 0;
  for (size_t i = 0; i < shapes.size(); ++i) {
    plan.refused = static_cast<int64_t>(i);
    if (const char* reason = refusal(shapes[i])) {
      plan.reason = reason;
      return plan;
    }
    vectors += lora_grouped_vectors(shapes[i]);
    rank = std::max(rank, shapes[i].rank);
  }
  const int64_t samples = std::max<int64_t>(num_samples, 1),
                tiles = samples * ((shapes.front().num_tokens / samples + kTileTokens - 1) / kTileTokens);
  plan.refused = 0;
  if (std::max({vectors, tiles, 2 * shapes.front().in_features, 2 * shapes.front().out_features}) >
      std::numeric_limits<int32_t>::max()) {
    plan.reason = "sizes beyond 32 bits";
    return plan;
  }
  plan.fused = true;
  plan.rank_tiles = static_cast<int>(round_up(rank, 8) / 8);
  plan.workspace_bytes =
      static_cast<size_t>(lora_grouped_directory_bytes(static_cast<int64_t>(shapes.size())) + vectors * 16);
  return plan;
}

std::string LoraGroupedPlan::to_string() const {
  std::ostringstream out;
  if (fused) {
    out << "LoraGroupedPlan(path=fused, rank_tiles=" << rank_tiles << ", workspace_bytes=" << workspace_bytes
        << ")";
  } else {
    out << "LoraGroupedPlan(path=composed, adapter=" << refused << ", reason=\"" << reason << "\")";
  }
  return out.str();
}

}  // namespace alore::kernels
