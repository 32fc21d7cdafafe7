// What stands beside the adapter itself: grouped merges, and the low-rank linear of MLAE on its fused side
// path.
#include <algorithm>

#include "cuda_support.h"
#include "kernels/gemm.h"
#include "kernels/lora.h"
#include "kernels/merge.h"

namespace alore::harness {
namespace {

using kernels::DType;
using kernels::MergeFactor;

// The rows as weights of 3 * dim and 4 * dim rows in turn, like qkv and fc1 of a transformer's blocks, merged
// on the input's side ("before") by one adapter: W <- W (I + W'^T).
class MergeCase {
 public:
  MergeCase(const Problem& p, const Session& session)
      : context_(session.context()),
        dtype_(p.c.dtype),
        scale_(transposed(p.scale, p.c.experts, p.c.experts, p.c.experts), p.shape.factor),
        down_(transposed(p.up, p.c.experts, p.c.rank, p.shape.p_in), p.shape.factor),
        up_(transposed(p.down, p.c.experts, p.shape.p_in, p.c.rank), p.shape.factor),
        original_(expand(p, p.x, false, p.c.dtype)),
        target_(original_.size()) {
    const auto n = static_cast<int32_t>(p.c.experts), rank = static_cast<int32_t>(p.c.rank);
    const auto width = static_cast<int32_t>(p.shape.p_in);
    // The map over tokens reads the adapter backwards: enc is up with its axes swapped, and so on.
    const MergeFactor enc{up_.get(), rank * width, 1, width}, dec{down_.get(), width * rank, rank, 1};
    const MergeFactor scale{scale_.get(), n * n, 1, n};
    for (int64_t begin = 0, turn = 0; begin < p.c.tokens; ++turn) {
      const int64_t rows = std::min((turn % 2 == 0 ? 3 : 4) * p.c.dim, p.c.tokens - begin);
      const kernels::MergeShape shape{.num_tokens = rows,
                                      .num_experts = n,
                                      .s_in = n,
                                      .s_out = n,
                                      .p_in = width,
                                      .p_out = width,
                                      .rank = rank,
                                      .target = dtype_,
                                      .factor = p.shape.factor,
                                      .token_stride = p.c.dim,
                                      .element_stride = 1};
      const auto plan = kernels::plan_merge(shape, static_cast<size_t>(session.limits().shared_per_block));
      if (!plan.taken) throw std::runtime_error(plan.to_string());
      void* weight = target_.as<char>() + begin * p.c.dim * kernels::size_of(dtype_);
      merges_.push_back({kernels::merge_entry(shape, plan, {weight, weight}, enc, dec, scale), plan});
      begin += rows;
    }
  }

  void restore(const Session& session) const {
    session.copy(target_.get(), original_.get(), original_.size());
  }
  void run() const {
    kernels::merge_grouped(context_, dtype_, merges_.data(), static_cast<int64_t>(merges_.size()));
  }
  std::vector<char> weights() const { return target_.read(); }

 private:
  // [count, rows, columns] -> [count, columns, rows]
  static std::vector<double> transposed(const std::vector<double>& values, int64_t count, int64_t rows,
                                        int64_t columns) {
    std::vector<double> out(values.size());
    for (int64_t e = 0; e < count; ++e)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) {
          out[(e * columns + j) * rows + i] = values[(e * rows + i) * columns + j];
        }
    return out;
  }

  const kernels::CudaContext& context_;
  const DType dtype_;
  const Buffer scale_, down_, up_;  // as the adapter has them
  const Buffer original_, target_;
  std::vector<kernels::PlannedMerge> merges_;
};

// The frozen product included: y = x W^T + b + ((x A^T) * c) B^T, W stored in the activations' dtype.
class LoraCase {
 public:
  LoraCase(const Problem& p, const Session& session)
      : p_(p),
        context_(session.context()),
        shape_{.num_tokens = p.c.tokens,
               .in_features = p.c.dim,
               .out_features = p.c.dim,
               .rank = p.c.experts * p.c.rank,
               .expert_rank = p.c.rank,
               .activation = p.c.dtype,
               .factor = p.shape.factor},
        plan_(kernels::plan_lora(
            shape_, p.c.dtype,
            {session.limits().num_sms, static_cast<size_t>(session.limits().shared_per_block)})),
        x_(expand(p, p.x, false, p.c.dtype)),
        grad_out_(expand(p, p.grad_out, true, p.c.dtype)),
        weight_(p.weight, p.c.dtype),
        bias_(p.bias, p.c.dtype),
        coeff_(p.scale, shape_.factor),
        a_(p.down, shape_.factor),
        b_(p.up, shape_.factor),
        mask_(p.mask, kernels::accumulate_type(p.c.dtype)),
        packed_(plan_.operand_elements * kernels::size_of(p.c.dtype)),
        code_(p.c.tokens * plan_.code_width * kernels::size_of(p.c.dtype)),
        result_(x_.size()),
        grad_coeff_(coeff_.size()),
        grad_a_(a_.size()),
        grad_b_(b_.size()),
        workspace_(plan_.workspace_bytes) {
    coefficients_.coeff = coeff_.get();
    coefficients_.mask = mask_.get();
    if (plan_.forward != kernels::LoraPath::kFused || plan_.backward == kernels::LoraPath::kGemm) {
      throw std::runtime_error("the device leaves no fused path: " + plan_.to_string());
    }
    if (p.c.backward) low_rank_forward(nullptr);  // what a forward keeps
  }

  void run() const { p_.c.backward ? backward() : forward(); }

  void check(Row& row, const Expected& expected) const {
    const double tolerance = tolerance_of(p_.c.dtype);
    check_rows(row, p_, p_.c.backward ? "d(x)" : "out", result_.read(), p_.c.dtype, expected.rows,
               p_.c.backward, tolerance);
    if (!p_.c.backward) return;
    check_scale(row, p_, "d(coeff)", grad_coeff_.read(shape_.factor), expected, tolerance);
    check_whole(row, "d(A)", grad_a_.read(shape_.factor), expected.down, tolerance);
    check_whole(row, "d(B)", grad_b_.read(shape_.factor), expected.up, tolerance);
  }

 private:
  void low_rank_forward(void* y) const {
    kernels::lora_pack(context_, shape_, {a_.get(), b_.get()}, coefficients_, packed_.get(), nullptr,
                       nullptr);
    kernels::lora_fused_forward(context_, shape_, coefficients_, packed_.get(), x_.get(),
                                y ? bias_.get() : nullptr, code_.get(), y, nullptr);
  }

  // result += rows @ W^T, or rows @ W
  void add_base_product(const Buffer& rows, kernels::Op op) const {
    const int64_t d = p_.c.dim;
    kernels::gemm(context_, kernels::Op::kNone, op, p_.c.tokens, d, d, p_.c.dtype, rows.get(), d,
                  weight_.get(), d, 1.0f, p_.c.dtype, result_.get(), d);
  }

  void forward() const {
    low_rank_forward(result_.get());
    add_base_product(x_, kernels::Op::kTranspose);
  }

  void backward() const {
    kernels::lora_fused_backward(context_, shape_, plan_, {a_.get(), b_.get()}, coefficients_, packed_.get(),
                                 x_.get(), grad_out_.get(), code_.get(), result_.get(),
                                 {grad_a_.get(), grad_b_.get(), grad_coeff_.get()}, workspace_.get());
    add_base_product(grad_out_, kernels::Op::kNone);
  }

  const Problem& p_;
  const kernels::CudaContext& context_;
  const kernels::LoraShape shape_;
  const kernels::LoraPlan plan_;
  const Buffer x_, grad_out_, weight_, bias_, coeff_, a_, b_, mask_, packed_, code_;
  const Buffer result_, grad_coeff_, grad_a_, grad_b_, workspace_;
  kernels::Coefficients coefficients_;
};

}  // namespace

void run_merge(Row& row, const Problem& problem, const Expected& expected, const Settings& settings,
               const Session& session) {
  const MergeCase c(problem, session);
  row.path = "grouped";
  c.restore(session);
  c.run();
  session.synchronize();
  check_rows(row, problem, "W", c.weights(), problem.c.dtype, expected.rows, false,
             tolerance_of(problem.c.dtype));
  if (settings.check_only || !row.failures.empty()) return;
  // From the same weights each time: merged over and over they would grow past their dtype.
  row.microseconds = session.timed(settings.repeats, [&] { c.run(); }, [&] { c.restore(session); });
}

void run_masked_lora(Row& row, const Problem& problem, const Expected& expected, const Settings& settings,
                     const Session& session) {
  const LoraCase c(problem, session);
  row.path = "fused";
  c.run();
  session.synchronize();
  c.check(row, expected);
  if (settings.check_only || !row.failures.empty()) return;
  row.microseconds = session.timed(settings.repeats, [&] { c.run(); });
}

}  // namespace alore::harness
