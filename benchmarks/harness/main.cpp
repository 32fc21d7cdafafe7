// alore_bench --op layer_norm_alore|kron_linear --tokens N --dim N --experts N --rank N --dtype
// fp64|fp32|bf16|fp16
//             [--repeats N] [--check-only] [--json]
// Exit status: 0, 1 when a result is wrong, 2 for bad arguments.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <stdexcept>

#include "harness.h"

namespace {

using alore::harness::Options;
using alore::harness::Row;
using alore::kernels::DType;

struct UsageError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

int64_t positive(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < 1) {
    throw UsageError(name + " must be a positive integer, got '" + text + "'");
  }
  return value;
}

Options parse(int argc, char** argv) {
  static const std::map<std::string, DType> dtypes = {{"fp64", DType::kFloat64},
                                                      {"fp32", DType::kFloat32},
                                                      {"bf16", DType::kBFloat16},
                                                      {"fp16", DType::kFloat16}};
  Options o;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--check-only") {
      o.check_only = true;
      continue;
    }
    if (name == "--json") {
      o.json = true;
      continue;
    }
    if (i + 1 == argc) throw UsageError(name + " needs a value, or is no option");
    const std::string value = argv[++i];
    if (name == "--op") {
      if (value != "layer_norm_alore" && value != "kron_linear") {
        throw UsageError("--op must be layer_norm_alore or kron_linear, got '" + value + "'");
      }
      o.op = value;
    } else if (name == "--dtype") {
      if (!dtypes.count(value))
        throw UsageError("--dtype must be fp64, fp32, bf16 or fp16, got '" + value + "'");
      o.dtype = dtypes.at(value);
    } else if (name == "--tokens") {
      o.tokens = positive(name, value);
    } else if (name == "--dim") {
      o.dim = positive(name, value);
    } else if (name == "--experts") {
      o.experts = positive(name, value);
    } else if (name == "--rank") {
      o.rank = positive(name, value);
    } else if (name == "--repeats") {
      o.repeats = static_cast<int>(positive(name, value));
    } else {
      throw UsageError("no option " + name);
    }
  }
  if (o.dim % o.experts != 0) {
    throw UsageError("--dim must be divisible by --experts, got " + std::to_string(o.dim) + " and " +
                     std::to_string(o.experts));
  }
  return o;
}

void print(const Options& o, const Row& row) {
  const double bytes = 2.0 * o.tokens * o.dim * alore::kernels::size_of(o.dtype);  // x read, out written
  const double gb_per_s = row.microseconds > 0 ? bytes / row.microseconds / 1e3 : 0;
  const double of_copy = row.copy_us && row.microseconds > 0 ? 100.0 * *row.copy_us / row.microseconds : 0;
  const double of_dense = row.dense_us && row.microseconds > 0 ? row.microseconds / *row.dense_us : 0;
  if (o.json) {
    std::printf(
        "{\"op\": \"%s\", \"device\": \"%s\", \"tokens\": %lld, \"dim\": %lld, \"experts\": %lld, \"rank\": "
        "%lld, "
        "\"dtype\": \"%s\", \"error\": %.3e, \"tolerance\": %.1e, \"us\": %.2f, \"gb_per_s\": %.1f, "
        "\"percent_of_copy\": %.1f, \"x_dense_cublas\": %.3f}\n",
        o.op.c_str(), row.device.c_str(), static_cast<long long>(o.tokens), static_cast<long long>(o.dim),
        static_cast<long long>(o.experts), static_cast<long long>(o.rank), name_of(o.dtype), row.error,
        row.tolerance, row.microseconds, gb_per_s, of_copy, of_dense);
    return;
  }
  std::printf("%-16s %-4s %7lld x %-5lld n=%-2lld r=%-2lld %-8s | error %.1e (<= %.1e)", o.op.c_str(),
              row.device.c_str(), static_cast<long long>(o.tokens), static_cast<long long>(o.dim),
              static_cast<long long>(o.experts), static_cast<long long>(o.rank), name_of(o.dtype), row.error,
              row.tolerance);
  if (row.microseconds > 0) {
    std::printf(" | %9.1f us %8.1f GB/s %5.1f%% of copy", row.microseconds, gb_per_s, of_copy);
    if (row.dense_us) std::printf(" %5.2fx dense cuBLAS", of_dense);
  }
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse(argc, argv);
    const auto problem = alore::harness::make_problem(options);
    const auto expected = alore::harness::oracle(options, problem);
    Row row;
#ifdef ALORE_WITH_CUDA
    row = alore::harness::cuda_available() ? alore::harness::run_cuda(options, problem, expected)
                                           : alore::harness::run_cpu(options, problem, expected);
#else
    row = alore::harness::run_cpu(options, problem, expected);
#endif
    print(options, row);
    if (!(row.error <= row.tolerance)) {  // written so that NaN fails
      std::fprintf(stderr, "alore_bench: wrong result: error %.3e, allowed %.3e\n", row.error, row.tolerance);
      return 1;
    }
    return 0;
  } catch (const UsageError& error) {
    std::fprintf(stderr, "alore_bench: %s\n", error.what());
    return 2;
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "alore_bench: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "alore_bench: %s\n", error.what());
    return 1;
  }
}
