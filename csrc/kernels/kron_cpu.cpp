#include <algorithm>

#include "kernels/kron.h"

namespace alore::kernels {

template <typename T>
void kron_spread_scale_cpu(const T* scale, int64_t num_experts, int64_t s_in, int64_t s_out, int64_t rank,
                           T* spread) {
  const int64_t width = num_experts * rank;
  for (int64_t e = 0; e < num_experts; ++e) {
    for (int64_t ab = 0; ab < s_in * s_out; ++ab) {
      std::fill_n(spread + ab * width + e * rank, rank, scale[e * s_in * s_out + ab]);
    }
  }
}

template <typename T>
void kron_mix_cpu(const T* code, const T* spread, int64_t begin, int64_t end, int64_t s_in, int64_t s_out,
                  int64_t width, T* mixed) {
  for (int64_t t = begin; t < end; ++t) {
    const T* z = code + t * s_in * width;
    for (int64_t b = 0; b < s_out; ++b) {
      T* h = mixed + (t * s_out + b) * width;
      std::fill_n(h, width, T(0));
      for (int64_t a = 0; a < s_in; ++a) {
        const T *s = spread + (a * s_out + b) * width, *za = z + a * width;
#pragma omp simd
        for (int64_t w = 0; w < width; ++w) h[w] += s[w] * za[w];
      }
    }
  }
}

template <typename T>
void kron_unmix_cpu(const T* grad_mixed, const T* spread, int64_t begin, int64_t end, int64_t s_in,
                    int64_t s_out, int64_t width, T* grad_code) {
  for (int64_t t = begin; t < end; ++t) {
    const T* dh = grad_mixed + t * s_out * width;
    for (int64_t a = 0; a < s_in; ++a) {
      T* dz = grad_code + (t * s_in + a) * width;
      std::fill_n(dz, width, T(0));
      for (int64_t b = 0; b < s_out; ++b) {
        const T *s = spread + (a * s_out + b) * width, *dhb = dh + b * width;
#pragma omp simd
        for (int64_t w = 0; w < width; ++w) dz[w] += s[w] * dhb[w];
      }
    }
  }
}

template <typename T>
void kron_scale_grad_cpu(const T* code, const T* grad_mixed, int64_t begin, int64_t end, int64_t s_in,
                         int64_t s_out, int64_t width, T* grad_spread) {
  std::fill_n(grad_spread, s_in * s_out * width, T(0));
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t a = 0; a < s_in; ++a) {
      const T* z = code + (t * s_in + a) * width;
      for (int64_t b = 0; b < s_out; ++b) {
        const T* dh = grad_mixed + (t * s_out + b) * width;
        T* ds = grad_spread + (a * s_out + b) * width;
#pragma omp simd
        for (int64_t w = 0; w < width; ++w) ds[w] += z[w] * dh[w];
      }
    }
  }
}

#define ALORE_INSTANTIATE(T)                                                                            \
  template void kron_spread_scale_cpu<T>(const T*, int64_t, int64_t, int64_t, int64_t, T*);             \
  template void kron_mix_cpu<T>(const T*, const T*, int64_t, int64_t, int64_t, int64_t, int64_t, T*);   \
  template void kron_unmix_cpu<T>(const T*, const T*, int64_t, int64_t, int64_t, int64_t, int64_t, T*); \
  template void kron_scale_grad_cpu<T>(const T*, const T*, int64_t, int64_t, int64_t, int64_t, int64_t, T*);
ALORE_INSTANTIATE(float)
ALORE_INSTANTIATE(double)
#undef ALORE_INSTANTIATE

}  // namespace alore::kernels
