// Small dense products on one thread, held in registers. The adapters' GEMMs are 8 to 64 columns wide and a
// few dozen rows of a chunk long: there a library's packing, blocking and hand-over to threads cost more than
// the arithmetic, and a chunk that is still in cache is worth more than either.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace alore::kernels::simd {

// 32 bytes of T: one AVX2 register, two of NEON.
template <typename T>
struct VecOf {
  typedef T type __attribute__((vector_size(32)));
};
template <typename T>
using Vec = typename VecOf<T>::type;

template <typename T>
inline constexpr int kLanes = 32 / sizeof(T);

template <typename T>
constexpr int64_t round_up(int64_t n) {
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <typename T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}

template <typename T>
inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <typename T>
inline T sum_lanes(Vec<T> v) {
  T sum = 0;
  for (int i = 0; i < kLanes<T>; ++i) sum += v[i];
  return sum;
}

// Calls f(std::integral_constant<int, n>) for n in [1, kMax].
template <int kMax, typename F>
inline void with_constant(int64_t n, F&& f) {
  if constexpr (kMax > 1) {
    if (n < kMax) return with_constant<kMax - 1>(n, f);
  }
  f(std::integral_constant<int, kMax>{});
}

// Rows of a register tile: its 12 sums, kVecs vectors of b and a broadcast fit the 16 registers of AVX2, and
// 12 independent sums cover the latency of two multiply-adds a cycle.
inline constexpr int kMostRows = 12;
template <int kVecs>
inline constexpr int kTileRows = kMostRows / kVecs;

// c[kRows, kVecs * lanes] (+)= a[kRows, k] @ b[k, kVecs * lanes]. a's element (i, j) is a[i * lda + j], or
// a[j * lda + i] with kTransposed.
template <typename T, int kRows, int kVecs, bool kTransposed>
inline void tile(int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, bool add, T* c, int64_t ldc) {
  constexpr int kWidth = kLanes<T>;
  Vec<T> sums[kRows][kVecs] = {};
  for (int64_t j = 0; j < k; ++j) {
    Vec<T> row[kVecs];
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) row[v] = load(b + j * ldb + v * kWidth);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const T factor = kTransposed ? a[j * lda + i] : a[i * lda + j];
#pragma GCC unroll 2
      for (int v = 0; v < kVecs; ++v) sums[i][v] += factor * row[v];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVecs; ++v) {
      T* out = c + i * ldc + v * kWidth;
      store(out, add ? load<T>(out) + sums[i][v] : sums[i][v]);
    }
  }
}

template <typename T, int kVecs, bool kTransposed>
inline void tiles_of_rows(int64_t rows, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, bool add,
                          T* c, int64_t ldc) {
  constexpr int kRows = kTileRows<kVecs>;
  for (int64_t i = 0; i < rows; i += kRows) {
    const T* rows_of_a = a + i * (kTransposed ? 1 : lda);
    with_constant<kRows>(std::min<int64_t>(rows - i, kRows), [&](auto count) {
      tile<T, count(), kVecs, kTransposed>(k, rows_of_a, lda, b, ldb, add, c + i * ldc, ldc);
    });
  }
}

// The last columns, fewer than a vector: b and c go through zero-padded copies.
template <typename T, bool kTransposed>
void last_columns(int64_t rows, int64_t columns, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb,
                  bool add, T* c, int64_t ldc) {
  constexpr int kWidth = kLanes<T>, kDepth = 64;
  T padded[kDepth * kWidth], sums[kMostRows * kWidth];
  for (int64_t j = 0; j < k || j == 0; j += kDepth) {
    const int64_t depth = std::min<int64_t>(k - j, kDepth);
    std::fill_n(padded, kDepth * kWidth, T(0));
    for (int64_t l = 0; l < depth; ++l) std::copy_n(b + (j + l) * ldb, columns, padded + l * kWidth);
    for (int64_t i = 0; i < rows; i += kMostRows) {
      const int64_t count = std::min<int64_t>(rows - i, kMostRows);
      const T* part = kTransposed ? a + j * lda + i : a + i * lda + j;
      tiles_of_rows<T, 1, kTransposed>(count, depth, part, lda, padded, kWidth, false, sums, kWidth);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t l = 0; l < columns; ++l) {
          T* out = c + (i + r) * ldc + l;
          *out = (add || j > 0 ? *out : T(0)) + sums[r * kWidth + l];
        }
      }
    }
  }
}

// c[rows, columns] (+)= a @ b, row-major; a is [rows, k], or [k, rows] with kTransposed. Sums run over k in
// order.
template <typename T, bool kTransposed>
void multiply(int64_t rows, int64_t columns, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb,
              bool add, T* c, int64_t ldc) {
  constexpr int64_t kWidth = kLanes<T>;
  // Rows of the result at a time: all of them where b is long (transposed a: k is the chunk's rows) and a
  // slice of it should stay in the first-level cache; a tile or two where c is what streams.
  const int64_t group = kTransposed ? std::max<int64_t>(rows, 1) : kMostRows;
  for (int64_t i = 0; i < rows; i += group) {
    const int64_t count = std::min(group, rows - i);
    const T* part = a + i * (kTransposed ? 1 : lda);
    T* out = c + i * ldc;
    int64_t j = 0;
    for (; j + 2 * kWidth <= columns; j += 2 * kWidth) {
      tiles_of_rows<T, 2, kTransposed>(count, k, part, lda, b + j, ldb, add, out + j, ldc);
    }
    for (; j + kWidth <= columns; j += kWidth) {
      tiles_of_rows<T, 1, kTransposed>(count, k, part, lda, b + j, ldb, add, out + j, ldc);
    }
    if (j < columns) {
      last_columns<T, kTransposed>(count, columns - j, k, part, lda, b + j, ldb, add, out + j, ldc);
    }
  }
}

}  // namespace alore::kernels::simd
