#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace alore::harness {

// Calls f(begin, end) on parts of [0, rows), one part a hardware thread.
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

}  // namespace alore::harness
