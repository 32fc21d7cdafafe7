#include "cuda_support.h"

#include <algorithm>
#include <string>

#include "kernels/gemm.h"

namespace alore::harness {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

bool cuda_available() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  check(cudaMalloc(&data_, std::max<size_t>(bytes, 1)), "cudaMalloc");
  check(cudaMemset(data_, 0xff, bytes), "cudaMemset");
}

Buffer::Buffer(const std::vector<char>& bytes) : Buffer(bytes.size()) {
  check(cudaMemcpy(data_, bytes.data(), bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
}

std::vector<char> Buffer::read() const {
  std::vector<char> host(bytes_);
  check(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost), "cudaMemcpy");
  return host;
}

std::vector<double> Buffer::read(kernels::DType dtype) const {
  return decode(read().data(), static_cast<int64_t>(bytes_ / kernels::size_of(dtype)), dtype);
}

Session::Session() {
  int device = 0;
  cudaDeviceProp properties;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
  limits_ = {10 * properties.major + properties.minor, properties.multiProcessorCount,
             static_cast<int64_t>(properties.sharedMemPerBlockOptin)};
  flush_bytes_ = std::max<size_t>(2 * static_cast<size_t>(properties.l2CacheSize), size_t{1} << 20);
  // A blocking stream: it waits for the default stream, on which Buffer fills and copies.
  check(cudaStreamCreate(&context_.stream), "cudaStreamCreate");
  if (cublasCreate(&context_.blas) != CUBLAS_STATUS_SUCCESS ||
      cublasSetStream(context_.blas, context_.stream) != CUBLAS_STATUS_SUCCESS) {
    throw std::runtime_error("cublasCreate failed");
  }
}

Session::~Session() {
  cublasDestroy(context_.blas);
  cudaStreamDestroy(context_.stream);
}

void Session::synchronize() const { check(cudaStreamSynchronize(context_.stream), "kernel"); }

void Session::copy(void* to, const void* from, size_t bytes) const {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, context_.stream), "cudaMemcpyAsync");
}

double Session::timed(int repeats, const std::function<void()>& f,
                      const std::function<void()>& prepare) const {
  constexpr int kWarmup = 3;  // the first runs load modules
  const Buffer flush(flush_bytes_);
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start), "cudaEventCreate");
  check(cudaEventCreate(&stop), "cudaEventCreate");
  std::vector<double> samples;
  for (int i = 0; i < repeats + kWarmup; ++i) {
    if (prepare) prepare();
    check(cudaMemsetAsync(flush.get(), i, flush.size(), context_.stream), "cudaMemsetAsync");
    check(cudaEventRecord(start, context_.stream), "cudaEventRecord");
    f();
    check(cudaEventRecord(stop, context_.stream), "cudaEventRecord");
    check(cudaEventSynchronize(stop), "kernel");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start, stop), "cudaEventElapsedTime");
    if (i >= kWarmup) samples.push_back(ms * 1e3);
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  return median(samples);
}

void Session::time_references(Row& row, int repeats) const {
  const Case& c = row.c;
  const size_t half = c.bytes() / 2, element = kernels::size_of(c.dtype);
  {
    const Buffer from(half), to(half);
    row.copy_us = timed(repeats, [&] { copy(to.get(), from.get(), half); });
  }
  // Ordinary values: NaN would take a GPU less power, and so less time, than a training step's numbers.
  Case inputs = c;
  inputs.map = Map::kKronLinear;
  inputs.backward = true;
  const Problem p = make_problem(inputs);
  const Buffer x(expand(p, p.x, false, c.dtype));
  std::vector<double> dense(c.dim * c.dim);
  for (size_t i = 0; i < dense.size(); ++i) dense[i] = p.x[i % p.x.size()];
  const Buffer w(dense, c.dtype), out(c.elements() * element);
  const auto acc = kernels::accumulate_type(c.dtype);
  using kernels::Op;
  if (!c.backward) {
    row.dense_us = timed(repeats, [&] {
      kernels::gemm(context_, Op::kNone, Op::kNone, c.tokens, c.dim, c.dim, c.dtype, x.get(), c.dim, w.get(),
                    c.dim, 0.0f, c.dtype, out.get(), c.dim);
    });
    return;
  }
  const Buffer grad(expand(p, p.grad_out, false, c.dtype)), grad_w(dense.size() * kernels::size_of(acc));
  row.dense_us = timed(repeats, [&] {
    kernels::gemm(context_, Op::kNone, Op::kTranspose, c.tokens, c.dim, c.dim, c.dtype, grad.get(), c.dim,
                  w.get(), c.dim, 0.0f, c.dtype, out.get(), c.dim);
    kernels::gemm(context_, Op::kTranspose, Op::kNone, c.dim, c.dim, c.tokens, c.dtype, x.get(), c.dim,
                  grad.get(), c.dim, 0.0f, acc, grad_w.get(), c.dim);
  });
}

}  // namespace alore::harness
