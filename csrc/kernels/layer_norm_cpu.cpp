#include <cmath>

#include "kernels/layer_norm.h"
#include "kernels/simd_cpu.h"

namespace alore::kernels {
namespace {

using simd::kLanes;
using simd::load;
using simd::store;
using simd::Vec;

// Sums f(i, value type) over [0, n): f is called with vectors' first elements, then with single ones. Four
// running sums hide the latency of an addition.
template <typename T, typename OnVector, typename OnElement>
inline T sum_over(int64_t n, OnVector&& on_vector, OnElement&& on_element) {
  constexpr int kWidth = kLanes<T>;
  Vec<T> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) sums[s] += on_vector(i + s * kWidth);
  }
  for (; i + kWidth <= n; i += kWidth) sums[0] += on_vector(i);
  T sum = simd::sum_lanes<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) sum += on_element(i);
  return sum;
}

}  // namespace

template <typename T>
void layer_norm_cpu(const T* x, const T* weight, const T* bias, double eps, bool statistics_known,
                    int64_t begin, int64_t end, int64_t embed_dim, T* mean, T* rstd, T* out) {
  const int64_t d = embed_dim;
  for (int64_t t = begin; t < end; ++t) {
    const T* row = x + t * d;
    T* o = out + t * d;
    if (!statistics_known) {
      const T sum =
          sum_over<T>(d, [&](int64_t i) { return load(row + i); }, [&](int64_t i) { return row[i]; });
      const T m = sum / static_cast<T>(d);
      const T squares = sum_over<T>(
          d,
          [&](int64_t i) {
            const Vec<T> centred = load(row + i) - m;
            return centred * centred;
          },
          [&](int64_t i) { return (row[i] - m) * (row[i] - m); });
      mean[t] = m;
      rstd[t] = T(1) / std::sqrt(squares / static_cast<T>(d) + static_cast<T>(eps));
    }
    const T m = mean[t], r = rstd[t];
    int64_t i = 0;
    for (; i + kLanes<T> <= d; i += kLanes<T>) {
      store<T>(o + i, (load(row + i) - m) * r * load(weight + i) + load(bias + i));
    }
    for (; i < d; ++i) o[i] = (row[i] - m) * r * weight[i] + bias[i];
  }
}

// With g = grad * weight and n = (x - mean) * rstd:  dx = rstd * (g - mean(g) - n * mean(g * n)).
template <typename T>
void layer_norm_backward_cpu(const T* grad_a, const T* grad_b, const T* x, const T* weight, const T* mean,
                             const T* rstd, int64_t begin, int64_t end, int64_t embed_dim, T* grad_x) {
  constexpr int kWidth = kLanes<T>;
  const int64_t d = embed_dim;
  for (int64_t t = begin; t < end; ++t) {
    const T *a = grad_a + t * d, *b = grad_b + t * d, *row = x + t * d;
    T* dx = grad_x + t * d;
    const T m = mean[t], r = rstd[t];
    // One walk leaves g in dx, where the second, over what is now in the first-level cache, finds it.
    Vec<T> sums_g[2] = {}, sums_gc[2] = {};
    int64_t i = 0;
    const auto add_vector = [&](int64_t at, int s) {
      const Vec<T> g = (load(a + at) + load(b + at)) * load(weight + at);
      sums_g[s] += g;
      sums_gc[s] += g * (load(row + at) - m);
      store<T>(dx + at, g);
    };
    for (; i + 2 * kWidth <= d; i += 2 * kWidth) {
      add_vector(i, 0);
      add_vector(i + kWidth, 1);
    }
    for (; i + kWidth <= d; i += kWidth) add_vector(i, 0);
    T sum_g = simd::sum_lanes<T>(sums_g[0] + sums_g[1]), sum_gc = simd::sum_lanes<T>(sums_gc[0] + sums_gc[1]);
    for (; i < d; ++i) {
      const T g = (a[i] + b[i]) * weight[i];
      sum_g += g;
      sum_gc += g * (row[i] - m);
      dx[i] = g;
    }
    const T mean_g = sum_g / static_cast<T>(d), mean_gn = sum_gc * r / static_cast<T>(d);
    i = 0;
    for (; i + kWidth <= d; i += kWidth) {
      store<T>(dx + i, r * (load<T>(dx + i) - mean_g - (load(row + i) - m) * r * mean_gn));
    }
    for (; i < d; ++i) dx[i] = r * (dx[i] - mean_g - (row[i] - m) * r * mean_gn);
  }
}

template <typename T>
void layer_norm_affine_backward_cpu(const T* grad_a, const T* grad_b, const T* x, const T* mean,
                                    const T* rstd, int64_t begin, int64_t end, int64_t embed_dim,
                                    T* grad_weight, T* grad_bias) {
  const int64_t d = embed_dim;
  for (int64_t t = begin; t < end; ++t) {
    const T *a = grad_a + t * d, *b = grad_b + t * d, *row = x + t * d;
    const T m = mean[t], r = rstd[t];
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) {
      const T g = a[i] + b[i];
      grad_weight[i] += g * (row[i] - m) * r;
      grad_bias[i] += g;
    }
  }
}

#define ALORE_INSTANTIATE(T)                                                                                 \
  template void layer_norm_cpu<T>(const T*, const T*, const T*, double, bool, int64_t, int64_t, int64_t, T*, \
                                  T*, T*);                                                                   \
  template void layer_norm_backward_cpu<T>(const T*, const T*, const T*, const T*, const T*, const T*,       \
                                           int64_t, int64_t, int64_t, T*);                                   \
  template void layer_norm_affine_backward_cpu<T>(const T*, const T*, const T*, const T*, const T*, int64_t, \
                                                  int64_t, int64_t, T*, T*);
ALORE_INSTANTIATE(float)
ALORE_INSTANTIATE(double)
#undef ALORE_INSTANTIATE

}  // namespace alore::kernels
