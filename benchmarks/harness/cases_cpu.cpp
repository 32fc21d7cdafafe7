// The CPU kernels, float32 or float64, over all hardware threads. Times are medians, the caches overwritten
// before each run.
#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <limits>

#include "harness.h"
#include "kernels/kron_cpu.h"
#include "parallel.h"

namespace alore::harness {
namespace {

template <typename T>
std::vector<T> as(const std::vector<double>& values) {
  return {values.begin(), values.end()};
}

template <typename T>
std::vector<T> expanded(const Problem& p, const std::vector<double>& values, bool tail = false) {
  const std::vector<char> bytes =
      expand(p, values, tail, sizeof(T) == 8 ? kernels::DType::kFloat64 : kernels::DType::kFloat32);
  std::vector<T> all(bytes.size() / sizeof(T));
  if (!bytes.empty()) std::memcpy(all.data(), bytes.data(), bytes.size());
  return all;
}

template <typename T>
std::vector<char> bytes_of(const std::vector<T>& values) {
  const char* from = reinterpret_cast<const char*>(values.data());
  return {from, from + values.size() * sizeof(T)};
}

double timed(int repeats, const std::function<void()>& f) {
  using Clock = std::chrono::steady_clock;
  std::vector<char> flush(size_t{64} << 20);
  std::vector<double> samples;
  for (int i = 0; i < repeats + 1; ++i) {
    std::fill(flush.begin(), flush.end(), static_cast<char>(i));
    const auto start = Clock::now();
    f();
    const double us = std::chrono::duration<double, std::micro>(Clock::now() - start).count();
    if (i >= 1) samples.push_back(us);  // the first run touches the memory
  }
  return median(samples);
}

// One case's tensors and how the kernels are called on them. Results and scratch start as NaN.
template <typename T>
struct CpuCase {
  static constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
  const Problem& p;
  const kernels::KronShape& s = p.shape;
  std::vector<T> x = expanded<T>(p, p.x), grad_out = expanded<T>(p, p.grad_out, true);
  std::vector<T> weight = as<T>(p.weight), bias = as<T>(p.bias);
  std::vector<T> mean, rstd;
  std::vector<T> result = std::vector<T>(p.c.elements(), kNan);  // out or grad_x
  std::vector<T> scale = std::vector<T>(p.scale.size(), kNan), down = std::vector<T>(p.down.size(), kNan);
  std::vector<T> up = std::vector<T>(p.up.size(), kNan);
  std::vector<T> packed = std::vector<T>(kernels::kron_packed_size_cpu(s), kNan);
  std::vector<T> partials;
  int64_t parts = kernels::kron_partials_cpu(s), part_size = kernels::kron_partial_size_cpu(s);

  explicit CpuCase(const Problem& problem) : p(problem) {
    mean = p.c.backward ? expanded<T>(p, p.mean) : std::vector<T>(p.c.tokens, kNan);
    rstd = p.c.backward ? expanded<T>(p, p.rstd) : std::vector<T>(p.c.tokens, kNan);
    partials.assign(parts * part_size, kNan);
    kernels::kron_pack_cpu<T>(s, as<T>(p.scale).data(), as<T>(p.down).data(), as<T>(p.up).data(),
                              packed.data());
  }

  void run() { p.c.backward ? backward() : forward(); }

  // Onto a copy where the residual is plain x: the norm's is the kernel's own.
  bool accumulates() const { return p.c.map == Map::kAlore; }

  void forward() {
    const kernels::KronNormCpu<T> norm{weight.data(), bias.data(), kNormEps, mean.data(), rstd.data()};
    parallel_rows(s.num_tokens, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(kernels::kron_scratch_size_cpu(s), kNan);
      if (accumulates()) copy_rows(x, begin, end);
      kernels::kron_forward_cpu<T>(s, packed.data(), x.data(), p.c.norm() ? &norm : nullptr, accumulates(),
                                   begin, end, result.data(), scratch.data());
    });
  }

  void backward() {
    const kernels::KronNormCpu<T> norm{weight.data(), bias.data(), kNormEps, mean.data(), rstd.data()};
    const int64_t per_part = (s.num_tokens + parts - 1) / parts;
    parallel_rows(parts, [&](int64_t first, int64_t last) {
      std::vector<T> scratch(kernels::kron_scratch_size_cpu(s), kNan);
      for (int64_t part = first; part < last; ++part) {
        const int64_t begin = std::min(part * per_part, s.num_tokens),
                      end = std::min(begin + per_part, s.num_tokens);
        if (accumulates()) copy_rows(grad_out, begin, end);
        kernels::kron_backward_cpu<T>(s, packed.data(), x.data(), grad_out.data(), grad_out.data(),
                                      p.c.norm() ? &norm : nullptr, accumulates(), false, begin, end,
                                      result.data(), partials.data() + part * part_size, scratch.data());
      }
    });
    kernels::kron_reduce_cpu<T>(s, partials.data(), parts, scale.data(), down.data(), up.data(), nullptr,
                                nullptr);
  }

  void copy_rows(const std::vector<T>& from, int64_t begin, int64_t end) {
    std::copy(from.begin() + begin * p.c.dim, from.begin() + end * p.c.dim, result.begin() + begin * p.c.dim);
  }

  void check(Row& row, const Expected& expected) const {
    const double tolerance = tolerance_of(p.c.dtype);
    const auto rows = [&](const char* name, const std::vector<T>& got, const std::vector<double>& want) {
      check_rows(row, p, name, bytes_of(got), p.c.dtype, want, p.c.backward, tolerance);
    };
    rows(p.c.backward ? "d(x)" : "out", result, expected.rows);
    if (p.c.norm() && !p.c.backward) rows("mean", mean, p.mean), rows("rstd", rstd, p.rstd);
    if (!p.c.backward) return;
    const auto wide = [](const std::vector<T>& v) { return std::vector<double>(v.begin(), v.end()); };
    check_scale(row, p, "d(scale)", wide(scale), expected, tolerance);
    check_whole(row, "d(down)", wide(down), expected.down, tolerance);
    check_whole(row, "d(up)", wide(up), expected.up, tolerance);
  }
};

double timed_copy(const Problem& p, int repeats) {
  const int64_t bytes = p.c.bytes() / 2;  // read as often as written
  const std::vector<char> from(bytes, 1);
  std::vector<char> to(bytes);
  return timed(repeats, [&] {
    parallel_rows(bytes, [&](int64_t begin, int64_t end) {
      std::memcpy(to.data() + begin, from.data() + begin, end - begin);
    });
  });
}

template <typename T>
Row run(const Problem& problem, const Expected& expected, const Settings& settings) {
  Row row{.c = problem.c, .device = "cpu", .path = "cpu"};
  CpuCase<T> c(problem);
  c.run();
  c.check(row, expected);
  if (settings.check_only || !row.failures.empty()) return row;
  row.microseconds = timed(settings.repeats, [&] { c.run(); });
  row.copy_us = timed_copy(problem, settings.repeats);
  return row;
}

}  // namespace

Row run_cpu(const Problem& problem, const Expected& expected, const Settings& settings) {
  return problem.c.dtype == kernels::DType::kFloat64 ? run<double>(problem, expected, settings)
                                                     : run<float>(problem, expected, settings);
}

}  // namespace alore::harness
