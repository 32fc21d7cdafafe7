// The CPU kernels, float32 or float64, over all hardware threads. The products around the mixing belong to
// ATen in the Python package and to the plain loop below here, so a row is an upper bound on what the package
// takes.
#include <algorithm>
#include <chrono>
#include <limits>
#include <stdexcept>
#include <thread>

#include "harness.h"
#include "kernels/kron.h"
#include "kernels/layer_norm.h"

namespace alore::harness {
namespace {

template <typename F>
void parallel_rows(int64_t rows, F&& f) {
  const int64_t threads = std::max<int64_t>(1, std::thread::hardware_concurrency());
  const int64_t per_thread = (rows + threads - 1) / threads;
  std::vector<std::thread> pool;
  for (int64_t begin = 0; begin < rows; begin += per_thread) {
    pool.emplace_back([&f, begin, end = std::min(rows, begin + per_thread)] { f(begin, end); });
  }
  for (std::thread& t : pool) t.join();
}

// out[m, n] (+)= a[m, k] @ b[k, n] for rows [begin, end), row-major.
template <typename T>
void multiply(const T* a, const T* b, int64_t begin, int64_t end, int64_t k, int64_t n, bool add, T* out) {
  for (int64_t row = begin; row < end; ++row) {
    T* o = out + row * n;
    if (!add) std::fill_n(o, n, T(0));
    for (int64_t i = 0; i < k; ++i) {
      const T v = a[row * k + i];
      for (int64_t j = 0; j < n; ++j) o[j] += v * b[i * n + j];
    }
  }
}

template <typename T>
Row run(const Options& o, const Problem& problem, const std::vector<double>& expected) {
  const auto& s = problem.shape;
  const auto as = [](const std::vector<double>& v) { return std::vector<T>(v.begin(), v.end()); };
  const auto x = as(problem.x), scale = as(problem.scale), up = as(problem.up);
  const auto weight = as(problem.weight), bias = as(problem.bias);
  std::vector<T> down(problem.down.size());  // [p_in, width]
  for (int64_t e = 0; e < s.num_experts; ++e)
    for (int64_t i = 0; i < s.p_in; ++i)
      for (int64_t k = 0; k < s.rank; ++k)
        down[(i * s.num_experts + e) * s.rank + k] =
            static_cast<T>(problem.down[(e * s.p_in + i) * s.rank + k]);
  std::vector<T> spread(s.s_in * s.s_out * s.width());
  kernels::kron_spread_scale_cpu<T>(scale.data(), s.num_experts, s.s_in, s.s_out, s.rank, spread.data());

  const bool norm = !weight.empty();
  std::vector<T> code(o.tokens * s.s_in * s.width()), mixed(o.tokens * s.s_out * s.width());
  std::vector<T> mean(o.tokens), rstd(o.tokens), out(x.size(), std::numeric_limits<T>::quiet_NaN());
  const auto once = [&] {
    parallel_rows(o.tokens, [&](int64_t begin, int64_t end) {
      const T* in = x.data();
      if (norm) {
        kernels::layer_norm_cpu<T>(in, weight.data(), bias.data(), kNormEps, false, begin, end, o.dim,
                                   mean.data(), rstd.data(), out.data());
        in = out.data();
      }
      multiply(in, down.data(), begin * s.s_in, end * s.s_in, s.p_in, s.width(), false, code.data());
      kernels::kron_mix_cpu<T>(code.data(), spread.data(), begin, end, s.s_in, s.s_out, s.width(),
                               mixed.data());
      multiply(mixed.data(), up.data(), begin * s.s_out, end * s.s_out, s.width(), s.p_out, norm, out.data());
    });
  };
  once();
  Row row{.device = "cpu", .tolerance = tolerance_of(o.dtype)};
  row.error = relative_error(std::vector<double>(out.begin(), out.end()), expected);
  if (o.check_only) return row;

  using Clock = std::chrono::steady_clock;
  const auto timed = [&](auto&& f) {
    std::vector<double> samples;
    for (int i = 0; i < o.repeats; ++i) {
      const auto start = Clock::now();
      f();
      samples.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
    }
    return median(samples);
  };
  row.microseconds = timed(once);
  row.copy_us = timed([&] {
    parallel_rows(o.tokens, [&](int64_t begin, int64_t end) {
      std::copy(x.begin() + begin * o.dim, x.begin() + end * o.dim, out.begin() + begin * o.dim);
    });
  });
  return row;
}

}  // namespace

Row run_cpu(const Options& options, const Problem& problem, const std::vector<double>& expected) {
  switch (options.dtype) {
    case kernels::DType::kFloat32:
      return run<float>(options, problem, expected);
    case kernels::DType::kFloat64:
      return run<double>(options, problem, expected);
    default:
      throw std::invalid_argument("the CPU kernels compute in fp32 and fp64: --dtype must be fp32 or fp64");
  }
}

}  // namespace alore::harness
