// The C++ benchmark harness: each case is checked against a float64 oracle, then timed. No torch, no Python.
//
// arguments.cpp     what to run: options and suites
// problem.cpp       a case's inputs
// oracle.cpp        its expected results
// check.cpp         dtypes on the host, and errors held to tolerances
// cases_cpu.cpp     the CPU kernels
// cuda_support.cpp  device memory and timing; the copy and the dense products that a row stands beside
// cases_cuda.cpp    the adapter's CUDA kernels
// extras_cuda.cpp   merges and the masked low-rank linear
// table.cpp         the table and its JSON
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/dtype.h"
#include "kernels/plan.h"

namespace alore::harness {

enum class Map { kLayerNormAlore, kAlore, kKronLinear, kMergeKron, kMaskedLora };

struct Case {
  Map map = Map::kLayerNormAlore;
  bool backward = false;   // dx and the gradients of all factors, in place of the forward
  int64_t tokens = 50432;  // kMergeKron: rows of all weights together
  int64_t dim = 768, experts = 4, rank = 4;
  kernels::DType dtype = kernels::DType::kFloat32;

  bool norm() const { return map == Map::kLayerNormAlore; }
  bool adds_base() const { return map != Map::kKronLinear; }
  int64_t elements() const { return tokens * dim; }
  // The least that must move: x read and a result written; backward reads x and d(out), writes d(x).
  int64_t bytes() const { return (backward ? 3 : 2) * elements() * kernels::size_of(dtype); }
  std::string op() const;     // as in the library: "layer_norm_alore_backward"
  std::string shape() const;  // "50432 x 768 n=4 r=4"
};

enum class Device { kCpu, kCuda };

struct Settings {
  std::vector<Case> cases;
  Device device = Device::kCpu;
  bool check_only = false;
  std::string json;  // a file, "-" for stdout, empty for none
  int repeats = 50;
};

struct UsageError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// A case's inputs in float64, already rounded to the dtype that the kernel will read.
//
// Large inputs repeat: token t has row t % rows, rows a prime, so that no tile of a kernel sees the rows of
// another at the same places and yet every token has an exact expectation. The factors' gradients sum over
// all tokens; for a lost token at the end, in a tile cut short, to show there the last kTailTokens rows of
// d(out) count tail_weight times.
struct Problem {
  Case c;
  int64_t rows = 0;          // min(tokens, kMostRows)
  double tail_weight = 1.0;  // a power of two: scaling is exact
  kernels::KronShape shape;
  std::vector<double> x, grad_out;      // [rows, dim]
  std::vector<double> scale, down, up;  // kernels/kron.h; kMaskedLora: coeff [n], A [n*r, dim], B [dim, n*r]
  std::vector<double> weight, bias;     // [dim] of the norm, or empty; kMaskedLora: W [dim, dim], [dim]
  std::vector<double> mask;             // kMaskedLora: [n]
  std::vector<double> mean, rstd;       // [rows] of the norm

  bool in_tail(int64_t token) const;
};

inline constexpr int64_t kMostRows = 1021, kTailTokens = 37;
inline constexpr double kNormEps = 1e-6;

Problem make_problem(const Case& c);  // also computes mean and rstd

struct Expected {
  std::vector<double> rows;             // [rows, dim]: out, or d(x) where d(out) has weight 1
  std::vector<double> scale, down, up;  // gradients over all tokens; empty in a forward
};

Expected oracle(const Problem& problem);

struct Row {
  Case c;
  std::string device, path;         // path: "fused", "general"; "grouped" (merges); "cpu"
  std::string worst;                // the result furthest from its oracle, as a share of its tolerance
  double error = 0, tolerance = 0;  // of `worst`: |result - oracle| / |oracle|
  std::vector<std::string> failures;
  double microseconds = 0;         // median; 0 with --check-only
  std::optional<double> copy_us;   // a copy that moves c.bytes(), same run
  std::optional<double> dense_us;  // the same by dense cuBLAS products with W' built beforehand, same run
};

// ---- check.cpp

double round_to(double value, kernels::DType dtype);
std::vector<char> encode(const std::vector<double>& values, kernels::DType dtype);
std::vector<double> decode(const char* bytes, int64_t count, kernels::DType dtype);
double tolerance_of(kernels::DType dtype);
double median(std::vector<double> samples);

// All tokens' rows of [rows, columns] values, as `dtype`; with `tail` the last ones are weighted.
std::vector<char> expand(const Problem& problem, const std::vector<double>& values, bool tail,
                         kernels::DType dtype);

// Holds the largest error of any token's row, or the error of a whole tensor, to `tolerance`. NaN fails.
void check_rows(Row& row, const Problem& problem, const std::string& name, const std::vector<char>& got,
                kernels::DType dtype, const std::vector<double>& expected, bool tail, double tolerance);
void check_whole(Row& row, const std::string& name, const std::vector<double>& got,
                 const std::vector<double>& expected, double tolerance);
// The same for d(scale) and d(coeff), which may be a single sum whose terms cancel: held to its usual length.
void check_scale(Row& row, const Problem& problem, const std::string& name, const std::vector<double>& got,
                 const Expected& expected, double tolerance);

// ---- arguments.cpp

Settings parse(int argc, char** argv);
const char* usage();

// ---- table.cpp

void print_header();
void print(const Row& row);
std::string to_json(const std::vector<Row>& rows);

// ---- cases

Row run_cpu(const Problem& problem, const Expected& expected, const Settings& settings);
bool cuda_available();
#ifdef ALORE_WITH_CUDA
Row run_cuda(const Problem& problem, const Expected& expected, const Settings& settings);
#endif

}  // namespace alore::harness
