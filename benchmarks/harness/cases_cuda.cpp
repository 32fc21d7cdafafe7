// The CUDA kernels. Times are medians over single runs between events, the L2 cache overwritten before each.
#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <functional>
#include <stdexcept>

#include "harness.h"
#include "kernels/gemm.h"
#include "kernels/kron.h"
#include "kernels/layer_norm.h"

namespace alore::harness {
namespace {

using kernels::DType;

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

std::vector<char> encode(const std::vector<double>& values, DType dtype) {
  std::vector<char> bytes(values.size() * kernels::size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    char* at = bytes.data() + i * kernels::size_of(dtype);
    const float f = static_cast<float>(values[i]);
    const auto h = static_cast<_Float16>(values[i]);
    if (dtype == DType::kFloat64) std::memcpy(at, &values[i], 8);
    if (dtype == DType::kFloat32) std::memcpy(at, &f, 4);
    if (dtype == DType::kFloat16) std::memcpy(at, &h, 2);
    if (dtype == DType::kBFloat16)
      std::memcpy(at, reinterpret_cast<const char*>(&f) + 2, 2);  // already rounded
  }
  return bytes;
}

std::vector<double> decode(const std::vector<char>& bytes, DType dtype) {
  std::vector<double> values(bytes.size() / kernels::size_of(dtype));
  for (size_t i = 0; i < values.size(); ++i) {
    const char* at = bytes.data() + i * kernels::size_of(dtype);
    double d = 0;
    float f = 0;
    _Float16 h;
    if (dtype == DType::kFloat64) std::memcpy(&d, at, 8), values[i] = d;
    if (dtype == DType::kFloat32) std::memcpy(&f, at, 4), values[i] = f;
    if (dtype == DType::kFloat16) std::memcpy(&h, at, 2), values[i] = static_cast<double>(h);
    if (dtype == DType::kBFloat16) std::memcpy(reinterpret_cast<char*>(&f) + 2, at, 2), values[i] = f;
  }
  return values;
}

// Device memory, filled with NaN bytes until something is written to it.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    check(cudaMalloc(&data_, std::max<size_t>(bytes, 1)));
    check(cudaMemset(data_, 0xff, bytes));
  }
  Buffer(const std::vector<double>& values, DType dtype) : Buffer(values.size() * kernels::size_of(dtype)) {
    check(cudaMemcpy(data_, encode(values, dtype).data(), bytes_, cudaMemcpyHostToDevice));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }
  void* get() const { return data_; }
  size_t size() const { return bytes_; }
  std::vector<double> read(DType dtype) const {
    std::vector<char> host(bytes_);
    check(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost));
    return decode(host, dtype);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

double timed(const Options& o, cudaStream_t stream, const Buffer& flush, const std::function<void()>& f) {
  cudaEvent_t start, stop;
  check(cudaEventCreate(&start));
  check(cudaEventCreate(&stop));
  std::vector<double> samples;
  for (int i = 0; i < o.repeats + 3; ++i) {
    check(cudaMemsetAsync(flush.get(), i, flush.size(), stream));
    check(cudaEventRecord(start, stream));
    f();
    check(cudaEventRecord(stop, stream));
    check(cudaEventSynchronize(stop));
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start, stop));
    if (i >= 3) samples.push_back(ms * 1e3);  // the first runs load modules
  }
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  return median(samples);
}

}  // namespace

bool cuda_available() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

Row run_cuda(const Options& o, const Problem& problem, const std::vector<double>& expected) {
  const auto& s = problem.shape;
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  cublasHandle_t blas;
  if (cublasCreate(&blas) != CUBLAS_STATUS_SUCCESS) throw std::runtime_error("cublasCreate failed");
  cublasSetStream(blas, stream);
  const kernels::CudaContext context{stream, blas};

  const DType acc = kernels::accumulate_type(o.dtype);
  const Buffer x(problem.x, o.dtype), scale(problem.scale, s.factor), down(problem.down, s.factor);
  const Buffer up(problem.up, s.factor), weight(problem.weight, s.factor), bias(problem.bias, s.factor);
  const Buffer mean(o.tokens * kernels::size_of(acc)), rstd(o.tokens * kernels::size_of(acc)), out(x.size());
  const auto plan = kernels::plan_kron_forward(s);
  const Buffer workspace(plan.workspace_bytes);
  const bool norm = !problem.weight.empty();
  const kernels::LayerNormShape norm_shape{o.tokens, o.dim, o.dtype, o.dtype, s.factor};
  const auto once = [&] {
    const kernels::KronFactors factors{scale.get(), down.get(), up.get()};
    if (norm) {
      kernels::layer_norm_forward(context, norm_shape, x.get(), weight.get(), bias.get(), kNormEps, out.get(),
                                  mean.get(), rstd.get());
    }
    kernels::kron_forward(context, s, plan, factors, norm ? out.get() : x.get(), norm ? 1.0f : 0.0f,
                          out.get(), workspace.get());
  };
  once();
  check(cudaStreamSynchronize(stream));
  Row row{.device = "cuda", .tolerance = tolerance_of(o.dtype)};
  row.error = relative_error(out.read(o.dtype), expected);
  if (!o.check_only) {
    const Buffer flush(size_t{256} << 20), dense(o.dim * o.dim * kernels::size_of(o.dtype));
    check(cudaMemset(dense.get(), 0x3c, dense.size()));
    row.microseconds = timed(o, stream, flush, once);
    row.copy_us = timed(o, stream, flush, [&] {
      check(cudaMemcpyAsync(out.get(), x.get(), x.size(), cudaMemcpyDeviceToDevice, stream));
    });
    row.dense_us = timed(o, stream, flush, [&] {
      kernels::gemm(context, kernels::Op::kNone, kernels::Op::kNone, o.tokens, o.dim, o.dim, o.dtype, x.get(),
                    o.dim, dense.get(), o.dim, 0.0f, o.dtype, out.get(), o.dim);
    });
  }
  cublasDestroy(blas);
  cudaStreamDestroy(stream);
  return row;
}

}  // namespace alore::harness
