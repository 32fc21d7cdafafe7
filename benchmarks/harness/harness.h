// The C++ benchmark harness: each case is checked against a float64 oracle, then timed. No torch, no Python.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/dtype.h"
#include "kernels/plan.h"

namespace alore::harness {

struct Options {
  std::string op = "layer_norm_alore";  // or "kron_linear"
  int64_t tokens = 50432, dim = 768, experts = 4, rank = 4;
  kernels::DType dtype = kernels::DType::kFloat32;
  bool check_only = false;
  bool json = false;
  int repeats = 50;
};

// A case's inputs in float64, already rounded to the dtype that the kernel will read.
struct Problem {
  kernels::KronShape shape;
  std::vector<double> x, scale, down, up;  // see kernels/kron.h
  std::vector<double> weight, bias;        // of the norm; empty for kron_linear
};

struct Row {
  std::string device;
  double error = 0;                // |out - oracle| / |oracle|
  double tolerance = 0;            // what error was held against
  double microseconds = 0;         // median; 0 with --check-only
  std::optional<double> copy_us;   // a copy of the same bytes (read x, write out), same run
  std::optional<double> dense_us;  // the same map as one dense [dim, dim] cuBLAS product, same run
};

inline constexpr double kNormEps = 1e-6;

Problem make_problem(const Options& options);  // oracle.cpp
std::vector<double> oracle(const Options& options, const Problem& problem);
double relative_error(const std::vector<double>& got, const std::vector<double>& expected);
double tolerance_of(kernels::DType dtype);
double round_to(double value, kernels::DType dtype);
double median(std::vector<double> samples);

Row run_cpu(const Options& options, const Problem& problem, const std::vector<double>& expected);
#ifdef ALORE_WITH_CUDA
bool cuda_available();
Row run_cuda(const Options& options, const Problem& problem, const std::vector<double>& expected);
#endif

}  // namespace alore::harness
