#include <algorithm>

#include "kernels/dropout.h"
#include "kernels/philox.h"

namespace alore::kernels {

template <typename T>
void dropout_add_cpu(const T* base, const T* branch, int64_t seed, double p, int64_t begin, int64_t end,
                     T* out) {
  const uint32_t threshold = drop_threshold(p);
  const T scale = static_cast<T>(1.0 / (1.0 - p));
  for (int64_t quad = begin; quad < end; quad += 4) {
    const Philox4 bits = philox(static_cast<uint64_t>(seed), static_cast<uint64_t>(quad / 4));
    for (int64_t i = quad; i < std::min(quad + 4, end); ++i) {
      const T kept = bits.v[i - quad] >= threshold ? branch[i] * scale : T(0);
      out[i] = base == nullptr ? kept : base[i] + kept;
    }
  }
}

template void dropout_add_cpu<float>(const float*, const float*, int64_t, double, int64_t, int64_t, float*);
template void dropout_add_cpu<double>(const double*, const double*, int64_t, double, int64_t, int64_t,
                                      double*);

}  // namespace alore::kernels
