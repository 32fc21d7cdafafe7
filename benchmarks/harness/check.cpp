// Dtypes on the host, and results held to their oracle.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>

#include "harness.h"

namespace alore::harness {
namespace {

using kernels::DType;

double load(const char* at, DType dtype) {
  double d = 0;
  float f = 0;
  _Float16 h;
  switch (dtype) {
    case DType::kFloat64:
      std::memcpy(&d, at, 8);
      return d;
    case DType::kFloat32:
      std::memcpy(&f, at, 4);
      return f;
    case DType::kFloat16:
      std::memcpy(&h, at, 2);
      return static_cast<double>(h);
    default:
      std::memcpy(reinterpret_cast<char*>(&f) + 2, at, 2);
      return f;
  }
}

// value is already of that dtype's precision.
void store(double value, DType dtype, char* at) {
  const float f = static_cast<float>(value);
  const auto h = static_cast<_Float16>(value);
  if (dtype == DType::kFloat64) std::memcpy(at, &value, 8);
  if (dtype == DType::kFloat32) std::memcpy(at, &f, 4);
  if (dtype == DType::kFloat16) std::memcpy(at, &h, 2);
  if (dtype == DType::kBFloat16) std::memcpy(at, reinterpret_cast<const char*>(&f) + 2, 2);
}

// |a - b| / |b| from sums of squares; two zeros agree.
double ratio(double difference, double norm) {
  return difference == 0.0 ? 0.0 : std::sqrt(difference / norm);
}

double dot(const std::vector<double>& a, const std::vector<double>& b) {
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

double squared_distance(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < b.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return sum;
}

void record(Row& row, const std::string& name, double error, double tolerance) {
  // Written so that NaN is the worst of all.
  if (row.worst.empty() || (!std::isnan(row.error) && !(error / tolerance <= row.error / row.tolerance))) {
    row.worst = name;
    row.error = error;
    row.tolerance = tolerance;
  }
  if (error <= tolerance) return;
  char text[160];
  std::snprintf(text, sizeof text, "%s is off by %.2e, tolerance %.1e", name.c_str(), error, tolerance);
  row.failures.push_back(row.c.op() + " " + row.c.shape() + " " + name_of(row.c.dtype) + " (" + row.path +
                         "): " + text);
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

double median(std::vector<double> samples) {
  std::nth_element(samples.begin(), samples.begin() + samples.size() / 2, samples.end());
  return samples[samples.size() / 2];
}

std::vector<char> encode(const std::vector<double>& values, DType dtype) {
  std::vector<char> bytes(values.size() * kernels::size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    store(values[i], dtype, bytes.data() + i * kernels::size_of(dtype));
  }
  return bytes;
}

std::vector<double> decode(const char* bytes, int64_t count, DType dtype) {
  std::vector<double> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = load(bytes + i * kernels::size_of(dtype), dtype);
  return values;
}

std::vector<char> expand(const Problem& p, const std::vector<double>& values, bool tail, DType dtype) {
  std::vector<double> weighted = values;
  for (double& v : weighted) v *= p.tail_weight;
  const std::vector<char> plain = encode(values, dtype), last = encode(weighted, dtype);
  const int64_t bytes = static_cast<int64_t>(plain.size()) / p.rows;
  std::vector<char> all(p.c.tokens * bytes);
  for (int64_t t = 0; t < p.c.tokens; ++t) {
    const std::vector<char>& from = tail && p.in_tail(t) ? last : plain;
    std::memcpy(all.data() + t * bytes, from.data() + t % p.rows * bytes, bytes);
  }
  return all;
}

void check_rows(Row& row, const Problem& p, const std::string& name, const std::vector<char>& got,
                DType dtype, const std::vector<double>& expected, bool tail, double tolerance) {
  const int64_t columns = static_cast<int64_t>(expected.size()) / p.rows;
  // A row whose terms nearly cancel has its operands' rounding error and next to no length of its own: it is
  // held to the usual row's length.
  double usual = 0;
  for (double w : expected) usual += w * w;
  usual /= static_cast<double>(p.rows);
  double worst = 0;
  for (int64_t t = 0; t < p.c.tokens; ++t) {
    const double* want = expected.data() + t % p.rows * columns;
    const char* have = got.data() + t * columns * kernels::size_of(dtype);
    const double weight = tail && p.in_tail(t) ? p.tail_weight : 1.0;
    double difference = 0, norm = 0;
    for (int64_t i = 0; i < columns; ++i) {
      const double w = weight * want[i], off = load(have + i * kernels::size_of(dtype), dtype) - w;
      difference += off * off;
      norm += w * w;
    }
    const double error = ratio(difference, std::max(norm, weight * weight * usual));
    if (!(error <= worst)) worst = error;
    if (std::isnan(error)) break;
  }
  record(row, name, worst, tolerance);
}

void check_whole(Row& row, const std::string& name, const std::vector<double>& got,
                 const std::vector<double>& expected, double tolerance) {
  record(row, name, ratio(squared_distance(got, expected), dot(expected, expected)), tolerance);
}

void check_scale(Row& row, const Problem& p, const std::string& name, const std::vector<double>& got,
                 const Expected& expected, double tolerance) {
  // <dS, S> = <dU, U>, the sum of as many terms as U has elements. Of terms with random signs it is
  // |dU| |U| / sqrt(size) in the root mean square.
  const double usual = dot(expected.up, expected.up) * dot(p.up, p.up) /
                       (dot(p.scale, p.scale) * static_cast<double>(p.up.size()));
  const double norm = std::max(dot(expected.scale, expected.scale), usual);
  record(row, name, ratio(squared_distance(got, expected.scale), norm), tolerance);
}

}  // namespace alore::harness
