// Device memory, timing and the handles that a CUDA case needs.
#pragma once

#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <functional>

#include "harness.h"
#include "kernels/alore.h"
#include "kernels/context.h"

namespace alore::harness {

void check(cudaError_t status, const char* what);

// Device memory, filled with NaN bytes until something is written to it.
class Buffer {
 public:
  explicit Buffer(size_t bytes);
  explicit Buffer(const std::vector<char>& bytes);
  Buffer(const std::vector<double>& values, kernels::DType dtype) : Buffer(encode(values, dtype)) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }

  void* get() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t size() const { return bytes_; }
  std::vector<char> read() const;
  std::vector<double> read(kernels::DType dtype) const;

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

// A stream, cuBLAS on it, and what plans ask of the device.
class Session {
 public:
  Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session();

  const kernels::CudaContext& context() const { return context_; }
  const kernels::DeviceLimits& limits() const { return limits_; }
  void synchronize() const;
  void copy(void* to, const void* from, size_t bytes) const;  // on the stream

  // Median microseconds of f between two events. Before each run, outside of the time: `prepare` where given,
  // then twice the second-level cache's size is written.
  double timed(int repeats, const std::function<void()>& f,
               const std::function<void()>& prepare = nullptr) const;

  // The row's copy_us, a copy that reads half of c.bytes() and writes as much, and its dense_us: [tokens,
  // dim] @ [dim, dim], and for a backward that product and the one for W' gradient.
  void time_references(Row& row, int repeats) const;

 private:
  kernels::CudaContext context_{};
  kernels::DeviceLimits limits_;
  size_t flush_bytes_ = 0;
};

// extras_cuda.cpp
void run_merge(Row& row, const Problem& problem, const Expected& expected, const Settings& settings,
               const Session& session);
void run_masked_lora(Row& row, const Problem& problem, const Expected& expected, const Settings& settings,
                     const Session& session);

}  // namespace alore::harness
