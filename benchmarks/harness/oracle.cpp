#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

#include "harness.h"

namespace alore::harness {
namespace {

using kernels::DType;

void fill(std::vector<double>& v, int64_t size, double spread, DType dtype, std::mt19937_64& rng) {
  std::normal_distribution<double> normal(0.0, spread);
  v.resize(size);
  for (double& e : v) e = round_to(normal(rng), dtype);
}

}  // namespace

double round_to(double value, DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return value;
    case DType::kFloat32:
      return static_cast<float>(value);
    case DType::kFloat16:
      return static_cast<double>(static_cast<_Float16>(value));
    case DType::kBFloat16: {
      const float f = static_cast<float>(value);
      uint32_t bits;
      std::memcpy(&bits, &f, sizeof bits);
      bits += 0x7fff + ((bits >> 16) & 1);
      bits &= 0xffff0000u;
      float rounded;
      std::memcpy(&rounded, &bits, sizeof rounded);
      return rounded;
    }
  }
  return value;
}

double tolerance_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 1e-12;
    case DType::kFloat32:
      return 1e-5;
    case DType::kFloat16:
      return 2e-3;
    default:
      return 1.5e-2;
  }
}

Problem make_problem(const Options& o) {
  const int64_t n = o.experts, p = o.dim / n;
  Problem problem;
  problem.shape = {.num_tokens = o.tokens,
                   .num_experts = n,
                   .s_in = n,
                   .s_out = n,
                   .p_in = p,
                   .p_out = p,
                   .rank = o.rank,
                   .activation = o.dtype,
                   .factor = kernels::accumulate_type(o.dtype)};
  const DType factor = problem.shape.factor;
  std::mt19937_64 rng(20240701);
  fill(problem.x, o.tokens * o.dim, 1.0, o.dtype, rng);
  fill(problem.scale, problem.shape.scale_size(), 1.0 / std::sqrt(n), factor, rng);
  fill(problem.down, problem.shape.down_size(), 1.0 / std::sqrt(p), factor, rng);
  fill(problem.up, problem.shape.up_size(), 1.0 / std::sqrt(n * o.rank), factor, rng);
  if (o.op == "layer_norm_alore") {
    fill(problem.weight, o.dim, 1.0, factor, rng);
    fill(problem.bias, o.dim, 1.0, factor, rng);
  }
  return problem;
}

// The equations of kernels/kron.h, as they stand there.
std::vector<double> oracle(const Options& o, const Problem& problem) {
  const auto& s = problem.shape;
  const int64_t d = o.dim, n = s.num_experts, p = s.p_in, r = s.rank;
  std::vector<double> out(problem.x.size()), row(d), code(n * n * r), mixed(n * n * r);
  for (int64_t t = 0; t < o.tokens; ++t) {
    std::copy_n(problem.x.begin() + t * d, d, row.begin());
    const bool norm = !problem.weight.empty();
    if (norm) {
      double mean = 0, variance = 0;
      for (double v : row) mean += v / d;
      for (double v : row) variance += (v - mean) * (v - mean) / d;
      for (int64_t i = 0; i < d; ++i) {
        row[i] = (row[i] - mean) / std::sqrt(variance + kNormEps) * problem.weight[i] + problem.bias[i];
      }
    }
    std::fill(code.begin(), code.end(), 0.0);
    for (int64_t a = 0; a < n; ++a)
      for (int64_t e = 0; e < n; ++e)
        for (int64_t i = 0; i < p; ++i)
          for (int64_t k = 0; k < r; ++k)
            code[(a * n + e) * r + k] += row[a * p + i] * problem.down[(e * p + i) * r + k];
    std::fill(mixed.begin(), mixed.end(), 0.0);
    for (int64_t b = 0; b < n; ++b)
      for (int64_t e = 0; e < n; ++e)
        for (int64_t a = 0; a < n; ++a)
          for (int64_t k = 0; k < r; ++k)
            mixed[(b * n + e) * r + k] += problem.scale[(e * n + a) * n + b] * code[(a * n + e) * r + k];
    for (int64_t b = 0; b < n; ++b)
      for (int64_t i = 0; i < p; ++i) {
        double sum = norm ? row[b * p + i] : 0.0;
        for (int64_t e = 0; e < n; ++e)
          for (int64_t k = 0; k < r; ++k) sum += mixed[(b * n + e) * r + k] * problem.up[(e * r + k) * p + i];
        out[t * d + b * p + i] = sum;
      }
  }
  return out;
}

double relative_error(const std::vector<double>& got, const std::vector<double>& expected) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += (got[i] - expected[i]) * (got[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(difference / norm);
}

double median(std::vector<double> samples) {
  std::nth_element(samples.begin(), samples.begin() + samples.size() / 2, samples.end());
  return samples[samples.size() / 2];
}

}  // namespace alore::harness
