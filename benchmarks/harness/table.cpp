// The table, and the same as JSON.
#include <cmath>
#include <cstdio>

#include "harness.h"

namespace alore::harness {
namespace {

double gb_per_s(const Row& row) { return row.c.bytes() / row.microseconds / 1e3; }

std::string number(const char* format, double value) {
  if (!std::isfinite(value)) return "null";  // JSON has no NaN
  char text[64];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

}  // namespace

void print_header() {
  std::printf("%-27s %-24s %-8s %-7s | %9s %8s | %6s | %8s | error (tolerance)\n", "op", "shape", "dtype",
              "path", "us", "GB/s", "% copy", "x cuBLAS");
}

void print(const Row& row) {
  std::string us = "-", rate = "-", copy = "-", dense = "-";
  if (row.microseconds > 0) {
    us = number("%.1f", row.microseconds);
    rate = number("%.0f", gb_per_s(row));
    if (row.copy_us) copy = number("%.1f", 100.0 * *row.copy_us / row.microseconds);
    if (row.dense_us) dense = number("%.2f", row.microseconds / *row.dense_us);
  }
  std::printf("%-27s %-24s %-8s %-7s | %9s %8s | %6s | %8s | %s %.1e (%.1e)%s\n", row.c.op().c_str(),
              row.c.shape().c_str(), name_of(row.c.dtype), row.path.c_str(), us.c_str(), rate.c_str(),
              copy.c_str(), dense.c_str(), row.worst.c_str(), row.error, row.tolerance,
              row.failures.empty() ? "" : " WRONG");
  std::fflush(stdout);
}

std::string to_json(const std::vector<Row>& rows) {
  std::string text = "[\n";
  for (const Row& row : rows) {
    const bool timed = row.microseconds > 0;
    const auto add = [&](const char* name, const std::string& value) {
      text += std::string(", \"") + name + "\": " + value;
    };
    text += "  {\"op\": \"" + row.c.op() + "\"";
    add("device", "\"" + row.device + "\"");
    add("path", "\"" + row.path + "\"");
    add("dtype", std::string("\"") + name_of(row.c.dtype) + "\"");
    add("tokens", std::to_string(row.c.tokens));
    add("dim", std::to_string(row.c.dim));
    add("experts", std::to_string(row.c.experts));
    add("rank", std::to_string(row.c.rank));
    add("correct", row.failures.empty() ? "true" : "false");
    add("worst", "\"" + row.worst + "\"");
    add("error", number("%.3e", row.error));
    add("tolerance", number("%.1e", row.tolerance));
    add("us", timed ? number("%.2f", row.microseconds) : "null");
    add("gb_per_s", timed ? number("%.1f", gb_per_s(row)) : "null");
    add("copy_us", row.copy_us ? number("%.2f", *row.copy_us) : "null");
    add("percent_of_copy",
        timed && row.copy_us ? number("%.1f", 100.0 * *row.copy_us / row.microseconds) : "null");
    add("dense_us", row.dense_us ? number("%.2f", *row.dense_us) : "null");
    add("x_cublas", timed && row.dense_us ? number("%.3f", row.microseconds / *row.dense_us) : "null");
    text += &row == &rows.back() ? "}\n" : "},\n";
  }
  return text + "]\n";
}

}  // namespace alore::harness
