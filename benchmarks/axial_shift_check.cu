// The axial shifts' CUDA kernels against the CPU's, bit for bit, for compute-sanitizer: random shapes,
// dtypes, directions and alignments, in allocations of exactly the tensors' sizes, without torch.
// device_check.sh builds and runs it.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "kernels/axial_shift.h"

namespace {

using namespace alore::kernels;
using Bytes = std::vector<unsigned char>;

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "axial_shift_check: %s\n", cudaGetErrorString(status));
  std::exit(2);
}

// A tensor's bytes, `lead` behind a multiple of 16, and not one more behind them.
class Tensor {
 public:
  Tensor(size_t bytes, size_t lead) : bytes_(bytes), lead_(lead) {
    check(cudaMalloc(&memory_, lead + bytes));
    check(cudaMemset(memory_, 0xAB, lead + bytes));
  }
  ~Tensor() { cudaFree(memory_); }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  void* data() const { return memory_ + lead_; }
  void write(const Bytes& host) { check(cudaMemcpy(data(), host.data(), bytes_, cudaMemcpyHostToDevice)); }
  Bytes read() const {
    Bytes host(bytes_);
    check(cudaMemcpy(host.data(), data(), bytes_, cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  unsigned char* memory_ = nullptr;
  size_t bytes_, lead_;
};

Bytes on_cpu(const AxialShape& s, ShiftAxis axis, const Bytes& x) {
  Bytes out(x.size());
  axial_shift_cpu(s, axis, x.data(), 0, axial_shift_pieces_cpu(s), out.data());
  return out;
}

}  // namespace

int main() {
  const DType types[] = {DType::kFloat64, DType::kFloat32, DType::kFloat16, DType::kBFloat16};
  std::mt19937 rng(7);
  const auto draw = [&](int from, int to) { return std::uniform_int_distribution<int>(from, to)(rng); };
  const CudaContext context{nullptr, nullptr};
  int wrong = 0, calls = 0;
  for (int round = 0; round < 400; ++round) {
    AxialShape s;
    s.batch = draw(1, 3);
    s.channels = draw(0, 2) ? 8 * draw(1, 9) : draw(1, 70);
    s.height = draw(1, 17);
    s.width = draw(1, 17);
    s.shift_size = draw(1, 9);
    s.channels_last = draw(0, 1) == 1;
    s.type = types[draw(0, 3)];
    s.transposed = draw(0, 1) == 1;
    const size_t item = size_of(s.type), bytes = s.batch * s.channels * s.height * s.width * item;
    const size_t lead = draw(0, 3) ? 0 : item;
    Bytes host(bytes);
    for (auto& value : host) value = static_cast<unsigned char>(draw(0, 255));
    const Bytes along_width = on_cpu(s, ShiftAxis::kWidth, host),
                along_height = on_cpu(s, ShiftAxis::kHeight, host);

    Tensor x(bytes, lead), y(bytes, lead), z(bytes, lead);
    x.write(host);
    axial_shift(context, s, ShiftAxis::kHeight, x.data(), y.data());
    wrong += y.read() != along_height;
    axial_shift(context, s, ShiftAxis::kWidth, x.data(), y.data());
    wrong += y.read() != along_width;
    axial_shift_pair(context, s, x.data(), z.data(), y.data());
    wrong += z.read() != along_width || y.read() != along_height;
    axial_shift_sum(context, s, x.data(), y.data(),
                    z.data());  // its sums: python_tests/ops/test_axial_shift.py
    calls += 4;
  }
  check(cudaDeviceSynchronize());
  std::printf("%d calls, %d wrong\n", calls, wrong);
  return wrong != 0;
}
