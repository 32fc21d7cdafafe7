#include "kernels/plan.h"

#include <algorithm>
#include <sstream>

namespace alore::kernels {
namespace {

constexpr size_t kAlign = 256;
constexpr int64_t kMaxPartials = int64_t{1} << 22;  // partial sums of a two-stage reduction: 16 MiB of fp32

class Layout {
 public:
  size_t add(int64_t elements, DType type) {
    const size_t at = end_;
    end_ += (static_cast<size_t>(elements) * size_of(type) + kAlign - 1) / kAlign * kAlign;
    return at;
  }
  size_t end() const { return end_; }

 private:
  size_t end_ = 0;
};

void add_factors(const KronShape& s, Layout& layout, KronPlan& plan) {
  plan.scale = layout.add(s.scale_size(), accumulate_type(s.activation));
  plan.down = layout.add(s.down_size(), s.activation);
  plan.up = layout.add(s.up_size(), s.activation);
}

void choose_chunks(const KronShape& s, size_t bytes_per_token, KronPlan& plan) {
  const size_t reserved = kMaxPartials * size_of(accumulate_type(s.activation));
  const auto fits =
      static_cast<int64_t>((kMaxWorkspaceBytes - reserved) / std::max<size_t>(bytes_per_token, 1));
  plan.chunk_tokens = std::clamp<int64_t>(fits, 1, std::max<int64_t>(s.num_tokens, 1));
  plan.num_chunks = (s.num_tokens + plan.chunk_tokens - 1) / plan.chunk_tokens;
}

}  // namespace

int64_t plan_reduce_blocks(int64_t rows, int64_t columns) {
  const int64_t by_memory = kMaxPartials / std::max<int64_t>(columns, 1);
  const int64_t by_work = (rows + 31) / 32;
  return std::clamp<int64_t>(std::min(by_memory, by_work), 1, 512);
}

KronPlan plan_kron_forward(const KronShape& s) {
  KronPlan plan;
  Layout layout;
  add_factors(s, layout, plan);
  const DType acc = accumulate_type(s.activation);
  const int64_t code = s.s_in * s.width(), mixed = s.s_out * s.width();
  choose_chunks(s, code * size_of(acc) + mixed * size_of(s.activation), plan);
  plan.code = layout.add(plan.chunk_tokens * code, acc);
  plan.mixed = layout.add(plan.chunk_tokens * mixed, s.activation);
  plan.workspace_bytes = layout.end();
  return plan;
}

KronPlan plan_kron_backward(const KronShape& s) {
  KronPlan plan;
  Layout layout;
  add_factors(s, layout, plan);
  const DType acc = accumulate_type(s.activation);
  const int64_t code = s.s_in * s.width(), mixed = s.s_out * s.width();
  choose_chunks(s, (code + mixed) * (size_of(acc) + size_of(s.activation)), plan);
  plan.code = layout.add(plan.chunk_tokens * code, acc);
  plan.mixed = layout.add(plan.chunk_tokens * mixed, s.activation);
  plan.grad_code = layout.add(plan.chunk_tokens * code, s.activation);
  plan.grad_mixed = layout.add(plan.chunk_tokens * mixed, acc);
  plan.scale_grad_blocks = plan_reduce_blocks(plan.chunk_tokens, s.scale_size());
  plan.scale_partial = layout.add(plan.scale_grad_blocks * s.scale_size(), acc);
  plan.grad_down = layout.add(s.down_size(), acc);
  plan.grad_up = layout.add(s.up_size(), acc);
  plan.workspace_bytes = layout.end();
  return plan;
}

std::string KronPlan::to_string() const {
  std::ostringstream out;
  out << "KronPlan(path=gemm+mix, num_chunks=" << num_chunks << ", chunk_tokens=" << chunk_tokens;
  if (scale_grad_blocks) out << ", scale_grad_blocks=" << scale_grad_blocks;
  out << ", workspace_bytes=" << workspace_bytes << ")";
  return out.str();
}

}  // namespace alore::kernels
