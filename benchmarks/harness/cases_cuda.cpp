// The adapter's CUDA kernels: fused where the plan takes the shape, else composed as the library composes
// them (csrc/ops/ops.h).
#include "cuda_support.h"
#include "kernels/kron.h"
#include "kernels/layer_norm.h"

namespace alore::harness {
namespace {

using kernels::DType;

// One case's tensors on the device and how the kernels are called on them. Results and workspaces start as
// NaN.
class CudaCase {
 public:
  CudaCase(const Problem& problem, const Session& session)
      : p_(problem),
        session_(session),
        context_(session.context()),
        acc_(kernels::accumulate_type(p_.c.dtype)),
        kron_(p_.shape),
        shape_{.num_tokens = p_.c.tokens,
               .num_experts = p_.c.experts,
               .num_blocks = kron_.s_in,
               .block_dim = kron_.p_in,
               .rank = p_.c.rank,
               .input = p_.c.dtype,
               .output = p_.c.dtype,
               .factor = kron_.factor,
               .affine = kron_.factor,
               .norm = p_.c.norm(),
               .add_base = p_.c.adds_base()},
        norm_shape_{p_.c.tokens, p_.c.dim, p_.c.dtype, p_.c.dtype, kron_.factor},
        forward_(kernels::plan_alore_forward(shape_, session.limits())),
        backward_(kernels::plan_alore_backward(shape_, session.limits())),
        kron_plan_(p_.c.backward ? kernels::plan_kron_backward(kron_) : kernels::plan_kron_forward(kron_)),
        x_(expand(p_, p_.x, false, p_.c.dtype)),
        grad_out_(expand(p_, p_.grad_out, true, p_.c.dtype)),
        scale_(p_.scale, kron_.factor),
        down_(p_.down, kron_.factor),
        up_(p_.up, kron_.factor),
        weight_(p_.weight, kron_.factor),
        bias_(p_.bias, kron_.factor),
        mean_(statistics(p_.mean)),
        rstd_(statistics(p_.rstd)),
        result_(x_.size()),
        grad_scale_(scale_.size()),
        grad_down_(down_.size()),
        grad_up_(up_.size()),
        base_(needs_base() ? x_.size() : 0),
        grad_base_(needs_base() ? x_.size() : 0),
        workspace_(fused() ? (p_.c.backward ? backward_.workspace_bytes : 0) : kron_plan_.workspace_bytes) {}

  bool fused() const { return p_.c.backward ? backward_.fused : forward_.fused; }

  void run() const {
    if (fused()) return p_.c.backward ? fused_backward() : fused_forward();
    p_.c.backward ? general_backward() : general_forward();
  }

  void check(Row& row, const Expected& expected) const {
    const double tolerance = tolerance_of(p_.c.dtype);
    check_rows(row, p_, p_.c.backward ? "d(x)" : "out", result_.read(), p_.c.dtype, expected.rows,
               p_.c.backward, tolerance);
    if (p_.c.norm() && !p_.c.backward) {
      check_rows(row, p_, "mean", mean_.read(), acc_, p_.mean, false, tolerance_of(acc_));
      check_rows(row, p_, "rstd", rstd_.read(), acc_, p_.rstd, false, tolerance_of(acc_));
    }
    if (!p_.c.backward) return;
    check_scale(row, p_, "d(scale)", grad_scale_.read(kron_.factor), expected, tolerance);
    check_whole(row, "d(down)", grad_down_.read(kron_.factor), expected.down, tolerance);
    check_whole(row, "d(up)", grad_up_.read(kron_.factor), expected.up, tolerance);
  }

 private:
  // Of the general backward behind a norm: its result and that result's gradient.
  bool needs_base() const { return p_.c.norm() && p_.c.backward && !fused(); }

  // Written by a forward, read by a backward.
  std::vector<char> statistics(const std::vector<double>& values) const {
    if (p_.c.backward) return expand(p_, values, false, acc_);
    return std::vector<char>(p_.c.norm() ? p_.c.tokens * kernels::size_of(acc_) : 0, static_cast<char>(0xff));
  }

  kernels::AloreAdapter adapter() const { return {scale_.get(), down_.get(), up_.get()}; }
  kernels::AloreNormArgs norm() const {
    if (!p_.c.norm()) return {};
    return {weight_.get(), bias_.get(), static_cast<float>(kNormEps)};
  }

  void fused_forward() const {
    kernels::alore_forward(context_, shape_, forward_,
                           {.x = x_.get(),
                            .norm = norm(),
                            .adapter = adapter(),
                            .out = result_.get(),
                            .mean = p_.c.norm() ? mean_.as<float>() : nullptr,
                            .rstd = p_.c.norm() ? rstd_.as<float>() : nullptr});
  }

  void fused_backward() const {
    kernels::alore_backward(context_, shape_, backward_,
                            {.grad_out = grad_out_.get(),
                             .sum = x_.get(),
                             .norm = norm(),
                             .mean = p_.c.norm() ? mean_.as<float>() : nullptr,
                             .rstd = p_.c.norm() ? rstd_.as<float>() : nullptr,
                             .adapter = adapter(),
                             .grad_x = result_.get(),
                             .grad_scale = grad_scale_.get(),
                             .grad_down = grad_down_.get(),
                             .grad_up = grad_up_.get(),
                             .workspace = workspace_.get()});
  }

  void general_forward() const {
    const kernels::KronFactors factors{scale_.get(), down_.get(), up_.get()};
    if (p_.c.norm()) {
      kernels::layer_norm_forward(context_, norm_shape_, x_.get(), weight_.get(), bias_.get(), kNormEps,
                                  result_.get(), mean_.get(), rstd_.get());
    } else if (p_.c.adds_base()) {
      session_.copy(result_.get(), x_.get(), x_.size());
    }
    kernels::kron_forward(context_, kron_, kron_plan_, factors, p_.c.adds_base() ? result_.get() : x_.get(),
                          p_.c.adds_base() ? 1.0f : 0.0f, result_.get(), workspace_.get());
  }

  void general_backward() const {
    const kernels::KronFactors factors{scale_.get(), down_.get(), up_.get()};
    const kernels::KronGradients grads{grad_scale_.get(), grad_down_.get(), grad_up_.get()};
    if (!p_.c.norm()) {
      if (p_.c.adds_base()) session_.copy(result_.get(), grad_out_.get(), grad_out_.size());
      kernels::kron_backward(context_, kron_, kron_plan_, factors, x_.get(), grad_out_.get(),
                             p_.c.adds_base() ? 1.0f : 0.0f, result_.get(), grads, workspace_.get());
      return;
    }
    kernels::layer_norm_recompute(context_, norm_shape_, x_.get(), weight_.get(), bias_.get(), mean_.get(),
                                  rstd_.get(), base_.get());
    kernels::kron_backward(context_, kron_, kron_plan_, factors, base_.get(), grad_out_.get(), 0.0f,
                           grad_base_.get(), grads, workspace_.get());
    kernels::layer_norm_backward(context_, norm_shape_, grad_out_.get(), grad_base_.get(), x_.get(),
                                 weight_.get(), mean_.get(), rstd_.get(), result_.get());
  }

  const Problem& p_;
  const Session& session_;
  const kernels::CudaContext& context_;
  const DType acc_;
  const kernels::KronShape kron_;
  const kernels::AloreShape shape_;
  const kernels::LayerNormShape norm_shape_;
  const kernels::AloreForwardPlan forward_;
  const kernels::AloreBackwardPlan backward_;
  const kernels::KronPlan kron_plan_;
  const Buffer x_, grad_out_, scale_, down_, up_, weight_, bias_, mean_, rstd_;
  const Buffer result_;  // out or d(x)
  const Buffer grad_scale_, grad_down_, grad_up_, base_, grad_base_, workspace_;
};

void run_kron(Row& row, const Problem& problem, const Expected& expected, const Settings& settings,
              const Session& session) {
  const CudaCase c(problem, session);
  row.path = c.fused() ? "fused" : "general";
  c.run();
  session.synchronize();
  c.check(row, expected);
  if (settings.check_only || !row.failures.empty()) return;
  row.microseconds = session.timed(settings.repeats, [&] { c.run(); });
}

}  // namespace

Row run_cuda(const Problem& problem, const Expected& expected, const Settings& settings) {
  // One for all cases, and never destroyed: at exit the CUDA runtime may be gone first.
  static const Session& session = *new Session;
  Row row{.c = problem.c, .device = "cuda"};
  if (problem.c.map == Map::kMergeKron) {
    run_merge(row, problem, expected, settings, session);
  } else if (problem.c.map == Map::kMaskedLora) {
    run_masked_lora(row, problem, expected, settings, session);
  } else {
    run_kron(row, problem, expected, settings, session);
  }
  if (row.microseconds > 0) session.time_references(row, settings.repeats);
  return row;
}

}  // namespace alore::harness
