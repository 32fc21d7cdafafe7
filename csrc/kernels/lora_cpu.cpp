#include "kernels/lora_cpu.h"

#include <algorithm>

#include "kernels/simd_cpu.h"

namespace alore::kernels {
namespace {

using simd::multiply;

int64_t padded_rank(const LoraShapeCpu& s) { return simd::round_up<float>(s.rank); }

// Experts stand in `order` here: rows or columns [0, active) are those that take part in the product.
struct PackedLayout {
  int64_t width, a, b, a_t, b_t, coeff, size;

  explicit PackedLayout(const LoraShapeCpu& s) : width(padded_rank(s)) {
    a = 0;                                // [rank, in_features]
    b_t = a + s.rank * s.in_features;     // [rank, out_features]
    a_t = b_t + s.rank * s.out_features;  // [in_features, width]
    b = a_t + s.in_features * width;      // [out_features, width]
    coeff = b + s.out_features * width;   // [rank]
    size = coeff + s.rank;
  }
};

struct PartialLayout {
  int64_t a, b_t, coeff, size;

  explicit PartialLayout(const LoraShapeCpu& s) {
    a = 0;                                  // [rank, in_features]
    b_t = a + s.rank * s.in_features;       // [rank, out_features]
    coeff = b_t + s.rank * s.out_features;  // [rank]
    size = coeff + s.rank;
  }
};

// columns [0, active) *= coeff
template <typename T>
void scale_columns(int64_t tokens, int64_t width, const T* coeff, int64_t active, T* code) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t r = 0; r < active; ++r) code[t * width + r] *= coeff[r];
  }
}

}  // namespace

int64_t lora_chunk_tokens_cpu(const LoraShapeCpu& s) {
  // Rows of x and of the result, 192 KiB of both in fp32, in whole register tiles of 12 rows.
  const int64_t per_token = s.in_features + s.out_features + 2 * padded_rank(s);
  return std::clamp<int64_t>(49152 / per_token / 12 * 12, 12, 96);
}

int64_t lora_packed_size_cpu(const LoraShapeCpu& s) { return PackedLayout(s).size; }
int64_t lora_scratch_size_cpu(const LoraShapeCpu& s) { return 2 * lora_chunk_tokens_cpu(s) * padded_rank(s); }
int64_t lora_partial_size_cpu(const LoraShapeCpu& s) { return PartialLayout(s).size; }

int64_t lora_partials_cpu(const LoraShapeCpu& s) {
  // At least 96 tokens each, so that adding the partial sums up costs little; and 16 MiB (in fp32) for all of
  // them.
  const int64_t most = std::clamp<int64_t>((int64_t{4} << 20) / lora_partial_size_cpu(s), 1, 64);
  return std::clamp<int64_t>(s.num_tokens / 96, 1, most);
}

template <typename T>
int64_t lora_pack_cpu(const LoraShapeCpu& s, const T* a, const T* b, const T* coeff, T* packed,
                      int64_t* order) {
  const PackedLayout at(s);
  int64_t active = 0, rest = s.rank;
  for (int64_t r = 0; r < s.rank; ++r) order[coeff[r] != T(0) ? active++ : --rest] = r;
  std::fill_n(packed + at.a_t, (s.in_features + s.out_features) * at.width, T(0));
  for (int64_t r = 0; r < s.rank; ++r) {
    const int64_t expert = order[r];
    packed[at.coeff + r] = coeff[expert];
    for (int64_t i = 0; i < s.in_features; ++i) {
      packed[at.a + r * s.in_features + i] = packed[at.a_t + i * at.width + r] =
          a[expert * s.in_features + i];
    }
    for (int64_t o = 0; o < s.out_features; ++o) {
      packed[at.b_t + r * s.out_features + o] = packed[at.b + o * at.width + r] = b[o * s.rank + expert];
    }
  }
  return active;
}

template <typename T>
void lora_forward_cpu(const LoraShapeCpu& s, const T* packed, int64_t active, const T* x, int64_t begin,
                      int64_t end, T* out, T* scratch) {
  const PackedLayout at(s);
  const int64_t chunk = lora_chunk_tokens_cpu(s), width = at.width;
  if (active == 0) return;
  const int64_t columns = simd::round_up<T>(active);
  for (int64_t t = begin; t < end; t += chunk) {
    const int64_t tokens = std::min(chunk, end - t);
    multiply<T, false>(tokens, columns, s.in_features, x + t * s.in_features, s.in_features, packed + at.a_t,
                       width, false, scratch, width);
    scale_columns(tokens, width, packed + at.coeff, active, scratch);
    multiply<T, false>(tokens, s.out_features, active, scratch, width, packed + at.b_t, s.out_features, true,
                       out + t * s.out_features, s.out_features);
  }
}

template <typename T>
void lora_backward_cpu(const LoraShapeCpu& s, const T* packed, int64_t active, const T* x, const T* grad_out,
                       int64_t begin, int64_t end, T* grad_x, T* partial, T* scratch) {
  const PackedLayout at(s);
  const PartialLayout sum(s);
  const int64_t chunk = lora_chunk_tokens_cpu(s), width = at.width;
  T *code = scratch, *grad_code = scratch + chunk * width;
  std::fill_n(partial, sum.size, T(0));
  for (int64_t t = begin; t < end; t += chunk) {
    const int64_t tokens = std::min(chunk, end - t);
    const T *rows = x + t * s.in_features, *grad = grad_out + t * s.out_features;
    multiply<T, false>(tokens, width, s.in_features, rows, s.in_features, packed + at.a_t, width, false, code,
                       width);
    multiply<T, false>(tokens, width, s.out_features, grad, s.out_features, packed + at.b, width, false,
                       grad_code, width);
    for (int64_t i = 0; i < tokens; ++i) {
      for (int64_t r = 0; r < s.rank; ++r) {
        partial[sum.coeff + r] += code[i * width + r] * grad_code[i * width + r];
      }
    }
    scale_columns(tokens, width, packed + at.coeff, active, code);
    scale_columns(tokens, width, packed + at.coeff, active, grad_code);
    multiply<T, true>(active, s.out_features, tokens, code, width, grad, s.out_features, true,
                      partial + sum.b_t, s.out_features);
    multiply<T, true>(active, s.in_features, tokens, grad_code, width, rows, s.in_features, true,
                      partial + sum.a, s.in_features);
    if (grad_x == nullptr || active == 0) continue;
    multiply<T, false>(tokens, s.in_features, active, grad_code, width, packed + at.a, s.in_features, true,
                       grad_x + t * s.in_features, s.in_features);
  }
}

template <typename T>
void lora_reduce_cpu(const LoraShapeCpu& s, int64_t active, const int64_t* order, const T* partials,
                     int64_t parts, T* grad_a, T* grad_b, T* grad_coeff) {
  const PartialLayout at(s);
  std::fill_n(grad_a, s.rank * s.in_features, T(0));
  std::fill_n(grad_b, s.out_features * s.rank, T(0));
  std::fill_n(grad_coeff, s.rank, T(0));
  for (int64_t part = 0; part < parts; ++part) {
    const T* p = partials + part * at.size;
    for (int64_t r = 0; r < s.rank; ++r) grad_coeff[order[r]] += p[at.coeff + r];
    for (int64_t r = 0; r < active; ++r) {
      T* row = grad_a + order[r] * s.in_features;
#pragma omp simd
      for (int64_t i = 0; i < s.in_features; ++i) row[i] += p[at.a + r * s.in_features + i];
      for (int64_t o = 0; o < s.out_features; ++o) {
        grad_b[o * s.rank + order[r]] += p[at.b_t + r * s.out_features + o];
      }
    }
  }
}

#define ALORE_INSTANTIATE(T)                                                                                \
  template int64_t lora_pack_cpu<T>(const LoraShapeCpu&, const T*, const T*, const T*, T*, int64_t*);       \
  template void lora_forward_cpu<T>(const LoraShapeCpu&, const T*, int64_t, const T*, int64_t, int64_t, T*, \
                                    T*);                                                                    \
  template void lora_backward_cpu<T>(const LoraShapeCpu&, const T*, int64_t, const T*, const T*, int64_t,   \
                                     int64_t, T*, T*, T*);                                                  \
  template void lora_reduce_cpu<T>(const LoraShapeCpu&, int64_t, const int64_t*, const T*, int64_t, T*, T*, \
                                   T*);
ALORE_INSTANTIATE(float)
ALORE_INSTANTIATE(double)
#undef ALORE_INSTANTIATE

}  // namespace alore::kernels
