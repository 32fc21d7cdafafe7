#include "kernels/merge_plan.h"

#include "kernels/merge.h"

#include <algorithm>
#include <limits>
#include <sstream>

namespace alore::kernels {
namespace {

constexpr int64_t kMaxInt = std::numeric_limits<int32_t>::max();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether no two elements share an address. True of every slice of a matrix; what this cannot see is refused.
bool is_injective(const MergeShape& s, int64_t token_elements) {
  const int64_t token_span = (token_elements - 1) * s.element_stride + 1;
  const int64_t across_span = (s.num_tokens - 1) * s.token_stride + 1;
  const bool along = token_elements == 1 || s.element_stride > 0;
  const bool across = s.num_tokens == 1 || s.token_stride > 0;
  return along && across &&
         (s.num_tokens == 1 || token_elements == 1 || s.token_stride >= token_span ||
          s.element_stride >= across_span);
}

// Shared memory of a tile of `rows` rows: the stage, the staged factors, and, where the code takes more than
// one step, the mixed codes of them all.
size_t shared_bytes(const MergeShape& s, int64_t rows) {
  const DType acc = accumulate_type(s.target);
  const int64_t steps = ceil_div(s.code_width(), kMergeColumns);
  const int64_t factors =
      std::max<int64_t>(steps * merge_factor_elements(s.target, acc), s.s_out * kMergeColumns);
  const int64_t mixed = steps > 1 ? steps * rows * merge_code_stride(acc) : 0;
  return merge_stage_bytes(s.target) + (factors + mixed) * size_of(acc);
}

MergePlan refuse(const char* reason) {
  MergePlan plan;
  plan.reason = reason;
  return plan;
}

}  // namespace

MergePlan plan_merge(const MergeShape& s, size_t shared_limit) {
  const int64_t token_elements = s.s_out * s.p_out;
  if (s.factor == DType::kFloat64 && s.target != DType::kFloat64) {
    return refuse("float64 factors on a narrower weight");
  }
  if (s.num_tokens > kMaxInt || token_elements > kMaxInt || s.code_width() > kMaxInt ||
      s.num_experts * std::max(s.p_in, s.p_out) * s.rank > kMaxInt ||
      s.num_experts * s.s_in * s.s_out > kMaxInt) {
    return refuse("sizes beyond 32 bits");
  }
  if (s.num_tokens > 0 && !is_injective(s, token_elements)) return refuse("strides that may overlap");

  const int64_t blocks = std::max(s.s_in, s.s_out);
  int64_t tokens = merge_rows(accumulate_type(s.target)) / blocks;
  if (tokens == 0) return refuse("more blocks in a token than a tile has rows");
  // In eights, so that vectors across tokens keep their alignment; fewer where the tokens are fewer.
  tokens = std::min(tokens, ceil_div(std::max<int64_t>(s.num_tokens, 1), 8) * 8);
  if (tokens > 8) tokens -= tokens % 8;
  while (tokens > 1 && shared_bytes(s, tokens * blocks) > shared_limit) {
    tokens = tokens > 8 ? tokens - 8 : tokens - 1;
  }
  if (shared_bytes(s, tokens * blocks) > shared_limit) return refuse("codes that shared memory cannot hold");

  if (tokens * s.token_stride + (token_elements + kMergeChunk) * s.element_stride > kMaxInt)
    return refuse("sizes beyond 32 bits");

  MergePlan plan;
  plan.taken = true;
  plan.rows = s.num_tokens == 1 || s.element_stride == 1 || s.token_stride != 1;
  plan.tokens_per_tile = static_cast<int>(tokens);
  plan.splits = s.low_rank ? static_cast<int>(ceil_div(token_elements, kMergeSplit)) : 1;
  plan.num_tiles = ceil_div(s.num_tokens, tokens) * plan.splits;
  plan.shared_bytes = shared_bytes(s, tokens * blocks);
  if (plan.num_tiles > kMaxInt) return refuse("sizes beyond 32 bits");
  return plan;
}

MergeEntry merge_entry(const MergeShape& s, const MergePlan& plan, MergeMemory memory, MergeFactor enc,
                       MergeFactor dec, MergeFactor scale) {
  MergeEntry entry;
  entry.memory = memory;
  entry.token_stride = s.token_stride;
  entry.element_stride = s.element_stride;
  entry.enc = enc;
  entry.dec = dec;
  entry.scale = scale;
  entry.num_tokens = static_cast<int32_t>(s.num_tokens);
  entry.s_in = static_cast<int32_t>(s.s_in);
  entry.s_out = static_cast<int32_t>(s.s_out);
  entry.p_in = static_cast<int32_t>(s.p_in);
  entry.p_out = static_cast<int32_t>(s.p_out);
  entry.rank = static_cast<int32_t>(s.rank);
  entry.code_width = static_cast<int32_t>(s.code_width());
  entry.tokens_per_tile = plan.tokens_per_tile;
  entry.splits = plan.splits;
  entry.factor = s.factor;
  entry.low_rank = s.low_rank;
  entry.rows = plan.rows;
  // A vector lies within one block of one token, or within one element of a tile's tokens, and starts at a
  // multiple of 16 bytes.
  const int64_t vector = merge_vector(s.target);
  const bool aligned = reinterpret_cast<uintptr_t>(memory.target) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(memory.source) % 16 == 0;
  entry.vectors =
      aligned && (plan.rows ? s.element_stride == 1 && s.p_in % vector == 0 && s.p_out % vector == 0 &&
                                  (s.num_tokens == 1 || s.token_stride % vector == 0)
                            : s.token_stride == 1 && s.element_stride % vector == 0 &&
                                  plan.tokens_per_tile % vector == 0);
  return entry;
}

std::string MergePlan::to_string() const {
  std::ostringstream out;
  if (!taken) {
    out << "MergePlan(path=composed, reason=\"" << reason << "\")";
    return out.str();
  }
  out << "MergePlan(path=grouped, layout=" << (rows ? "rows" : "columns")
      << ", tokens_per_tile=" << tokens_per_tile << ", num_tiles=" << num_tiles << ", splits=" << splits
      << ", shared_bytes=" << shared_bytes << ")";
  return out.str();
}

}  // namespace alore::kernels
