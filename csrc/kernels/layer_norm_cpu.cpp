#include <cmath>

#include "kernels/layer_norm.h"

namespace alore::kernels {

template <typename T>
void layer_norm_cpu(const T* x, const T* weight, const T* bias, double eps, bool statistics_known,
                    int64_t begin, int64_t end, int64_t embed_dim, T* mean, T* rstd, T* out) {
  const int64_t d = embed_dim;
  for (int64_t t = begin; t < end; ++t) {
    const T* row = x + t * d;
    T* o = out + t * d;
    if (!statistics_known) {
      T sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < d; ++i) sum += row[i];
      const T m = sum / static_cast<T>(d);
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < d; ++i) squares += (row[i] - m) * (row[i] - m);
      mean[t] = m;
      rstd[t] = T(1) / std::sqrt(squares / static_cast<T>(d) + static_cast<T>(eps));
    }
    const T m = mean[t], r = rstd[t];
    if (weight != nullptr && bias != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) o[i] = (row[i] - m) * r * weight[i] + bias[i];
    } else {
      for (int64_t i = 0; i < d; ++i) {
        o[i] = (row[i] - m) * r * (weight == nullptr ? T(1) : weight[i]) + (bias == nullptr ? T(0) : bias[i]);
      }
    }
  }
}

// With g = grad_out * weight and n = (x - mean) * rstd:  dx = rstd * (g - mean(g) - n * mean(g * n)).
template <typename T>
void layer_norm_backward_cpu(const T* grad_out, const T* x, const T* weight, const T* mean, const T* rstd,
                             int64_t begin, int64_t end, int64_t embed_dim, T* grad_x) {
  const int64_t d = embed_dim;
  for (int64_t t = begin; t < end; ++t) {
    const T *dy = grad_out + t * d, *row = x + t * d;
    T* dx = grad_x + t * d;
    const T m = mean[t], r = rstd[t];
    T sum_g = 0, sum_gn = 0;
    if (weight != nullptr) {
#pragma omp simd reduction(+ : sum_g, sum_gn)
      for (int64_t i = 0; i < d; ++i) {
        const T g = dy[i] * weight[i];
        sum_g += g;
        sum_gn += g * (row[i] - m) * r;
      }
    } else {
#pragma omp simd reduction(+ : sum_g, sum_gn)
      for (int64_t i = 0; i < d; ++i) {
        sum_g += dy[i];
        sum_gn += dy[i] * (row[i] - m) * r;
      }
    }
    const T mean_g = sum_g / static_cast<T>(d), mean_gn = sum_gn / static_cast<T>(d);
    for (int64_t i = 0; i < d; ++i) {
      const T g = weight == nullptr ? dy[i] : dy[i] * weight[i];
      dx[i] = r * (g - mean_g - (row[i] - m) * r * mean_gn);
    }
  }
}

#define ALORE_INSTANTIATE(T)                                                                                 \
  template void layer_norm_cpu<T>(const T*, const T*, const T*, double, bool, int64_t, int64_t, int64_t, T*, \
                                  T*, T*);                                                                   \
  template void layer_norm_backward_cpu<T>(const T*, const T*, const T*, const T*, const T*, int64_t,        \
                                           int64_t, int64_t, T*);
ALORE_INSTANTIATE(float)
ALORE_INSTANTIATE(double)
#undef ALORE_INSTANTIATE

}  // namespace alore::kernels
