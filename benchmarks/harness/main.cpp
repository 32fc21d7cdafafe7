// alore_bench: see usage() in arguments.cpp.
#include <cstdio>
#include <exception>
#include <fstream>

#include "harness.h"

namespace {

using namespace alore::harness;

Row run(const Case& c, const Settings& settings) {
  const Problem problem = make_problem(c);
  const Expected expected = oracle(problem);
#ifdef ALORE_WITH_CUDA
  if (settings.device == Device::kCuda) return run_cuda(problem, expected, settings);
#endif
  return run_cpu(problem, expected, settings);
}

void write_json(const std::string& path, const std::vector<Row>& rows) {
  const std::string text = to_json(rows);
  if (path == "-") {
    std::fputs(text.c_str(), stdout);
    return;
  }
  std::ofstream file(path);
  file << text;
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

int run_all(const Settings& settings) {
  const bool table = settings.json != "-";
  std::vector<Row> rows;
  int wrong = 0;
  if (table) print_header();
  for (const Case& c : settings.cases) {
    try {
      rows.push_back(run(c, settings));
    } catch (const std::exception& error) {
      // A CUDA error may be sticky: what follows it would mean nothing.
      throw std::runtime_error(c.op() + " " + c.shape() + " " + alore::kernels::name_of(c.dtype) + ": " +
                               error.what());
    }
    if (table) print(rows.back());
    for (const std::string& failure : rows.back().failures) {
      std::fprintf(stderr, "alore_bench: wrong result: %s\n", failure.c_str());
      ++wrong;
    }
  }
  if (!settings.json.empty()) write_json(settings.json, rows);
  return wrong == 0 ? 0 : 1;
}

}  // namespace

#ifndef ALORE_WITH_CUDA
bool alore::harness::cuda_available() { return false; }
#endif

int main(int argc, char** argv) {
  try {
    return run_all(parse(argc, argv));
  } catch (const UsageError& error) {
    std::fprintf(stderr, "alore_bench: %s\n%s", error.what(), usage());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "alore_bench: %s\n", error.what());
    return 1;
  }
}
