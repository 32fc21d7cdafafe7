// Expected results in float64: the equations of kernels/kron.h and kernels/lora.h as they stand there, and
// their derivatives, row by row.
#include <algorithm>
#include <mutex>

#include "harness.h"
#include "parallel.h"

namespace alore::harness {
namespace {

// Sums of the factors' gradients over one thread's rows.
struct Sums {
  std::vector<double> scale, down, up;

  explicit Sums(const Problem& p) : scale(p.scale.size()), down(p.down.size()), up(p.up.size()) {}
  void add_to(Expected& e) const {
    for (size_t i = 0; i < scale.size(); ++i) e.scale[i] += scale[i];
    for (size_t i = 0; i < down.size(); ++i) e.down[i] += down[i];
    for (size_t i = 0; i < up.size(); ++i) e.up[i] += up[i];
  }
};

// How often row t counts in a sum over all tokens.
double multiplicity(const Problem& p, int64_t row) {
  double sum = 0;
  for (int64_t t = row; t < p.c.tokens; t += p.rows) sum += p.in_tail(t) ? p.tail_weight : 1.0;
  return sum;
}

// One token of the Kronecker map. code and mixed are [n blocks, n experts, r], as Z and H of kernels/kron.h.
class KronRow {
 public:
  explicit KronRow(const Problem& p)
      : p_(p),
        d(p.c.dim),
        n(p.c.experts),
        b_(p.shape.p_in),
        r(p.c.rank),
        base_(d),
        normed_(d),
        code_(n * n * r),
        mixed_(code_.size()),
        grad_mixed_(code_.size()),
        grad_code_(code_.size()),
        grad_(d) {}

  void forward(int64_t t, double* out) {
    encode(t);
    for (int64_t b = 0; b < n; ++b)
      for (int64_t i = 0; i < b_; ++i) {
        double sum = p_.c.adds_base() ? base_[b * b_ + i] : 0.0;
        for (int64_t e = 0; e < n; ++e)
          for (int64_t k = 0; k < r; ++k) sum += mixed_[at(b, e, k)] * up(e, k, i);
        out[b * b_ + i] = sum;
      }
  }

  void backward(int64_t t, double* grad_x, Sums& sums) {
    encode(t);
    const double* dy = p_.grad_out.data() + t * d;
    const double weight = multiplicity(p_, t);
    for (int64_t b = 0; b < n; ++b)
      for (int64_t e = 0; e < n; ++e)
        for (int64_t k = 0; k < r; ++k) {
          double sum = 0;
          for (int64_t i = 0; i < b_; ++i) {
            sum += dy[b * b_ + i] * up(e, k, i);
            sums.up[(e * r + k) * b_ + i] += weight * mixed_[at(b, e, k)] * dy[b * b_ + i];
          }
          grad_mixed_[at(b, e, k)] = sum;
        }
    std::fill(grad_code_.begin(), grad_code_.end(), 0.0);
    for (int64_t e = 0; e < n; ++e)
      for (int64_t a = 0; a < n; ++a)
        for (int64_t b = 0; b < n; ++b)
          for (int64_t k = 0; k < r; ++k) {
            const int64_t entry = (e * n + a) * n + b;
            sums.scale[entry] += weight * code_[at(a, e, k)] * grad_mixed_[at(b, e, k)];
            grad_code_[at(a, e, k)] += p_.scale[entry] * grad_mixed_[at(b, e, k)];
          }
    for (int64_t a = 0; a < n; ++a)
      for (int64_t i = 0; i < b_; ++i) {
        double sum = p_.c.adds_base() ? dy[a * b_ + i] : 0.0;
        for (int64_t e = 0; e < n; ++e)
          for (int64_t k = 0; k < r; ++k) {
            sum += grad_code_[at(a, e, k)] * down(e, i, k);
            sums.down[(e * b_ + i) * r + k] += weight * base_[a * b_ + i] * grad_code_[at(a, e, k)];
          }
        grad_[a * b_ + i] = sum;
      }
    if (p_.c.norm()) norm_backward(t);
    std::copy(grad_.begin(), grad_.end(), grad_x);
  }

 private:
  int64_t at(int64_t block, int64_t e, int64_t k) const { return (block * n + e) * r + k; }
  double down(int64_t e, int64_t i, int64_t k) const { return p_.down[(e * b_ + i) * r + k]; }
  double up(int64_t e, int64_t k, int64_t i) const { return p_.up[(e * r + k) * b_ + i]; }

  void encode(int64_t t) {
    std::copy_n(p_.x.begin() + t * d, d, base_.begin());
    if (p_.c.norm()) {
      for (int64_t i = 0; i < d; ++i) {
        normed_[i] = (base_[i] - p_.mean[t]) * p_.rstd[t];
        base_[i] = normed_[i] * p_.weight[i] + p_.bias[i];
      }
    }
    std::fill(code_.begin(), code_.end(), 0.0);
    for (int64_t a = 0; a < n; ++a)
      for (int64_t e = 0; e < n; ++e)
        for (int64_t i = 0; i < b_; ++i)
          for (int64_t k = 0; k < r; ++k) code_[at(a, e, k)] += base_[a * b_ + i] * down(e, i, k);
    std::fill(mixed_.begin(), mixed_.end(), 0.0);
    for (int64_t b = 0; b < n; ++b)
      for (int64_t e = 0; e < n; ++e)
        for (int64_t a = 0; a < n; ++a)
          for (int64_t k = 0; k < r; ++k)
            mixed_[at(b, e, k)] += p_.scale[(e * n + a) * n + b] * code_[at(a, e, k)];
  }

  // grad_: from the gradient of the norm's result to that of its input.
  void norm_backward(int64_t t) {
    double mean = 0, along = 0;
    for (int64_t i = 0; i < d; ++i) {
      grad_[i] *= p_.weight[i];
      mean += grad_[i] / d;
      along += grad_[i] * normed_[i] / d;
    }
    for (int64_t i = 0; i < d; ++i) grad_[i] = p_.rstd[t] * (grad_[i] - mean - normed_[i] * along);
  }

  const Problem& p_;
  const int64_t d, n, b_, r;  // b_: width of a block
  std::vector<double> base_, normed_, code_, mixed_, grad_mixed_, grad_code_, grad_;
};

// One token of y = x W^T + bias + ((x A^T) * c) B^T, c = coeff * mask by expert.
class LoraRow {
 public:
  explicit LoraRow(const Problem& p) : p_(p), d(p.c.dim), width(p.c.experts * p.c.rank), code_(width) {}

  void forward(int64_t t, double* out) {
    encode(t);
    for (int64_t o = 0; o < d; ++o) {
      double sum = p_.bias[o];
      for (int64_t i = 0; i < d; ++i) sum += p_.x[t * d + i] * p_.weight[o * d + i];
      for (int64_t j = 0; j < width; ++j) sum += code_[j] * effective(j) * p_.up[o * width + j];
      out[o] = sum;
    }
  }

  void backward(int64_t t, double* grad_x, Sums& sums) {
    encode(t);
    const double *x = p_.x.data() + t * d, *dy = p_.grad_out.data() + t * d;
    const double weight = multiplicity(p_, t);
    std::fill_n(grad_x, d, 0.0);
    for (int64_t o = 0; o < d; ++o)
      for (int64_t i = 0; i < d; ++i) grad_x[i] += dy[o] * p_.weight[o * d + i];
    for (int64_t j = 0; j < width; ++j) {
      double sum = 0;  // of d(out) B, before c
      for (int64_t o = 0; o < d; ++o) {
        sum += dy[o] * p_.up[o * width + j];
        sums.up[o * width + j] += weight * dy[o] * code_[j] * effective(j);
      }
      for (int64_t i = 0; i < d; ++i) {
        grad_x[i] += sum * effective(j) * p_.down[j * d + i];
        sums.down[j * d + i] += weight * sum * effective(j) * x[i];
      }
      sums.scale[j / p_.c.rank] += weight * p_.mask[j / p_.c.rank] * code_[j] * sum;
    }
  }

 private:
  double effective(int64_t j) const { return p_.scale[j / p_.c.rank] * p_.mask[j / p_.c.rank]; }

  void encode(int64_t t) {
    for (int64_t j = 0; j < width; ++j) {
      code_[j] = 0;
      for (int64_t i = 0; i < d; ++i) code_[j] += p_.x[t * d + i] * p_.down[j * d + i];
    }
  }

  const Problem& p_;
  const int64_t d, width;
  std::vector<double> code_;
};

template <typename OneRow>
Expected run(const Problem& p) {
  Expected expected;
  expected.rows.resize(p.rows * p.c.dim);
  if (p.c.backward) {
    expected.scale.resize(p.scale.size());
    expected.down.resize(p.down.size());
    expected.up.resize(p.up.size());
  }
  std::mutex mutex;
  parallel_rows(p.rows, [&](int64_t begin, int64_t end) {
    OneRow row(p);
    Sums sums(p);
    for (int64_t t = begin; t < end; ++t) {
      double* out = expected.rows.data() + t * p.c.dim;
      p.c.backward ? row.backward(t, out, sums) : row.forward(t, out);
    }
    const std::lock_guard lock(mutex);
    if (p.c.backward) sums.add_to(expected);
  });
  return expected;
}

}  // namespace

Expected oracle(const Problem& problem) {
  return problem.c.map == Map::kMaskedLora ? run<LoraRow>(problem) : run<KronRow>(problem);
}

}  // namespace alore::harness
