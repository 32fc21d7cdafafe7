// The CPU kernels, float32 or float64, over all hardware threads.
#include <algorithm>
#include <chrono>
#include <limits>
#include <stdexcept>
#include <thread>

#include "harness.h"
#include "kernels/kron_cpu.h"

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

template <typename T>
Row run(const Options& o, const Problem& problem, const std::vector<double>& expected) {
  const auto& s = problem.shape;
  const auto as = [](const std::vector<double>& v) { return std::vector<T>(v.begin(), v.end()); };
  const auto x = as(problem.x), scale = as(problem.scale), up = as(problem.up);
  const auto weight = as(problem.weight), bias = as(problem.bias);
  const auto down = as(problem.down);
  std::vector<T> packed(kernels::kron_packed_size_cpu(s));
  kernels::kron_pack_cpu<T>(s, scale.data(), down.data(), up.data(), packed.data());

  std::vector<T> mean(o.tokens), rstd(o.tokens), out(x.size(), std::numeric_limits<T>::quiet_NaN());
  const kernels::KronNormCpu<T> norm{weight.data(), bias.data(), kNormEps, mean.data(), rstd.data()};
  const auto once = [&] {
    parallel_rows(o.tokens, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(kernels::kron_scratch_size_cpu(s));
      kernels::kron_forward_cpu<T>(s, packed.data(), x.data(), weight.empty() ? nullptr : &norm, false, begin,
                                   end, out.data(), scratch.data());
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
