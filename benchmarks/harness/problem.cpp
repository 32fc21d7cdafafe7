// A case's inputs.
#include <algorithm>
#include <cmath>
#include <random>

#include "harness.h"

namespace alore::harness {
namespace {

using kernels::DType;

class Source {
 public:
  std::vector<double> normal(int64_t size, double mean, double spread, DType dtype) {
    std::normal_distribution<double> draw(mean, spread);
    std::vector<double> values(size);
    for (double& v : values) v = round_to(draw(rng_), dtype);
    return values;
  }

 private:
  std::mt19937_64 rng_{20240701};
};

// Rows repeat, so all tokens together weigh about tokens / sqrt(kMostRows) rows in a gradient and the tail
// sqrt(kTailTokens): as much, within the range of float16.
double choose_tail_weight(int64_t tokens) {
  const double even = tokens / std::sqrt(static_cast<double>(kMostRows * kTailTokens));
  return tokens <= kMostRows ? 1.0 : std::exp2(std::clamp(std::floor(std::log2(even)), 0.0, 8.0));
}

void add_statistics(Problem& p) {
  const int64_t d = p.c.dim;
  for (int64_t t = 0; t < p.rows; ++t) {
    const double* row = p.x.data() + t * d;
    double mean = 0, variance = 0;
    for (int64_t i = 0; i < d; ++i) mean += row[i] / d;
    for (int64_t i = 0; i < d; ++i) variance += (row[i] - mean) * (row[i] - mean) / d;
    p.mean.push_back(mean);
    p.rstd.push_back(1.0 / std::sqrt(variance + kNormEps));
  }
}

}  // namespace

bool Problem::in_tail(int64_t token) const { return token >= c.tokens - kTailTokens; }

Problem make_problem(const Case& c) {
  const int64_t n = c.experts, p = c.dim / n, code = n * c.rank;
  const DType factor = kernels::accumulate_type(c.dtype);
  Problem problem;
  problem.c = c;
  problem.rows = std::min(c.tokens, kMostRows);
  problem.tail_weight = choose_tail_weight(c.tokens);
  problem.shape = {.num_tokens = c.tokens,
                   .num_experts = n,
                   .s_in = n,
                   .s_out = n,
                   .p_in = p,
                   .p_out = p,
                   .rank = c.rank,
                   .activation = c.dtype,
                   .factor = factor};
  Source source;
  // Not centred: a norm has something to subtract.
  problem.x = source.normal(problem.rows * c.dim, 1.0, 1.0, c.dtype);
  if (c.backward) problem.grad_out = source.normal(problem.rows * c.dim, 0.0, 1.0, c.dtype);
  if (c.map == Map::kMaskedLora) {
    const double spread = 1.0 / std::sqrt(c.dim);
    problem.weight = source.normal(c.dim * c.dim, 0.0, spread, c.dtype);
    problem.bias = source.normal(c.dim, 0.0, 1.0, c.dtype);
    problem.scale = source.normal(n, 0.0, 1.0, factor);
    problem.down = source.normal(code * c.dim, 0.0, spread, factor);
    problem.up = source.normal(c.dim * code, 0.0, 1.0 / std::sqrt(code), factor);
    problem.mask.assign(n, 2.0);
    if (n > 1) problem.mask[0] = 0.0;  // one expert is masked out
    return problem;
  }
  problem.scale = source.normal(problem.shape.scale_size(), 0.0, 1.0 / std::sqrt(n), factor);
  problem.down = source.normal(problem.shape.down_size(), 0.0, 1.0 / std::sqrt(p), factor);
  problem.up = source.normal(problem.shape.up_size(), 0.0, 1.0 / std::sqrt(code), factor);
  if (c.norm()) {
    problem.weight = source.normal(c.dim, 1.0, 0.5, factor);
    problem.bias = source.normal(c.dim, 0.0, 1.0, factor);
    add_statistics(problem);
  }
  return problem;
}

}  // namespace alore::harness
