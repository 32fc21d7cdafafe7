// Pieces that the fused ALoRE kernels share: tensor-core tiles of 16 tokens, and the factors' images in
// shared memory.
//
// A lane (g = lane / 4, c = lane % 4) holds, of rows g and g + 8, the 8 columns 8c .. 8c+7 of a group of 32:
// 16-byte loads and stores. mma.m16n8k16 wants columns 2c, 2c+1, 2c+8, 2c+9 of an operand there, but a sum
// does not care for the order of its terms: both operands are permuted alike, and no value moves between
// lanes. The same trick orders the output columns, so results land where the row's own values are.
#pragma once

#include "kernels/alore.h"
#include "kernels/alore_layout.h"
#include "kernels/async_copy.cuh"
#include "kernels/cuda_common.cuh"
#include "kernels/philox.h"
#include "kernels/tensor_core.cuh"

namespace alore::kernels {

template <typename T>
__device__ __forceinline__ float2 unpack2(uint32_t v) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
  } else {
    return __half22float2(*reinterpret_cast<const __half2*>(&v));
  }
}

template <typename T>
__device__ __forceinline__ uint32_t pack2(float a, float b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
  } else {
    const __half2 v = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
}

// 16 bytes in one instruction: left to itself the compiler may split a load, and split ones conflict.
__device__ __forceinline__ uint4 load_shared_16(const void* p) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(p))));
  return v;
}

// Streamed once: kept out of L1.
__device__ __forceinline__ uint4 load_streamed(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Eight neighbouring values of a row.
struct Eight {
  float v[8];
};

template <typename T>
__device__ __forceinline__ Eight unpack8(const uint4& q) {
  const float2 a = unpack2<T>(q.x), b = unpack2<T>(q.y), c = unpack2<T>(q.z), d = unpack2<T>(q.w);
  return {{a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y}};
}

template <typename T>
__device__ __forceinline__ uint4 pack8(const Eight& e) {
  return {pack2<T>(e.v[0], e.v[1]), pack2<T>(e.v[2], e.v[3]), pack2<T>(e.v[4], e.v[5]),
          pack2<T>(e.v[6], e.v[7])};
}

// The norm of a row; {0, 1} is no norm.
struct RowNorm {
  float mean, rstd;
};

// (x - mean) * rstd in one instruction a value. mean * rstd is rounded first: an error of 2^-24 of it, far
// below the 16-bit result's own rounding unless the mean is thousands of times the spread.
__device__ __forceinline__ Eight normalised(Eight x, RowNorm r) {
  const float shift = r.mean * r.rstd;
#pragma unroll
  for (int j = 0; j < 8; ++j) x.v[j] = x.v[j] * r.rstd - shift;
  return x;
}

__device__ __forceinline__ Eight affine(Eight n, const Eight& weight, const Eight& bias) {
#pragma unroll
  for (int j = 0; j < 8; ++j) n.v[j] = n.v[j] * weight.v[j] + bias.v[j];
  return n;
}

// Raw storage of eight values as loaded: packed for 16-bit types.
template <typename T>
struct Raw8 {
  uint4 q;
  __device__ __forceinline__ void load(const T* p) { q = load_streamed(p); }
  // As copied to shared memory in pieces of 16 bytes.
  __device__ __forceinline__ void read_pieces(const unsigned char* p) { q = load_shared_16(p); }
  __device__ __forceinline__ void zero() { q = {0, 0, 0, 0}; }
  __device__ __forceinline__ Eight floats() const { return unpack8<T>(q); }
  __device__ __forceinline__ void set(const Eight& e) { q = pack8<T>(e); }
  __device__ __forceinline__ void store(T* p) const { store_16(p, q); }
};

template <>
struct Raw8<float> {
  Eight e;
  __device__ __forceinline__ void load(const float* p) {
    const uint4 a = load_streamed(p), b = load_streamed(p + 4);
    e = {{__uint_as_float(a.x), __uint_as_float(a.y), __uint_as_float(a.z), __uint_as_float(a.w),
          __uint_as_float(b.x), __uint_as_float(b.y), __uint_as_float(b.z), __uint_as_float(b.w)}};
  }
  __device__ __forceinline__ void read_pieces(const unsigned char* p) {
    const uint4 a = load_shared_16(p), b = load_shared_16(p + 16);
    e = {{__uint_as_float(a.x), __uint_as_float(a.y), __uint_as_float(a.z), __uint_as_float(a.w),
          __uint_as_float(b.x), __uint_as_float(b.y), __uint_as_float(b.z), __uint_as_float(b.w)}};
  }
  __device__ __forceinline__ void zero() { e = {}; }
  __device__ __forceinline__ Eight floats() const { return e; }
  __device__ __forceinline__ void set(const Eight& v) { e = v; }
  __device__ __forceinline__ void store(float* p) const {
    store_16(p, {__float_as_uint(e.v[0]), __float_as_uint(e.v[1]), __float_as_uint(e.v[2]),
                 __float_as_uint(e.v[3])});
    store_16(p + 4, {__float_as_uint(e.v[4]), __float_as_uint(e.v[5]), __float_as_uint(e.v[6]),
                     __float_as_uint(e.v[7])});
  }
};

template <typename T>
__device__ __forceinline__ Eight shared8(const T* p) {
  if constexpr (std::is_same_v<T, float>) {
    const uint4 a = load_shared_16(p), b = load_shared_16(p + 4);
    return {{__uint_as_float(a.x), __uint_as_float(a.y), __uint_as_float(a.z), __uint_as_float(a.w),
             __uint_as_float(b.x), __uint_as_float(b.y), __uint_as_float(b.z), __uint_as_float(b.w)}};
  } else {
    return unpack8<T>(load_shared_16(p));
  }
}

// The dropout factors (0 or 1 / (1 - p)) of 8 elements from `element`, a multiple of 4: dropout.h's mask.
struct DropoutMask {
  const int64_t* seed;  // null: nothing is dropped
  uint32_t threshold;
  float scale;

  explicit DropoutMask(const int64_t* device_seed, double p)
      : seed(p > 0 ? device_seed : nullptr),
        threshold(drop_threshold(p)),
        scale(static_cast<float>(1.0 / (1.0 - p))) {}

  __device__ __forceinline__ Eight at(int64_t element) const {
    Eight m;
    const auto key = static_cast<uint64_t>(*seed);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Philox4 bits = philox(key, static_cast<uint64_t>(element / 4 + half));
#pragma unroll
      for (int j = 0; j < 4; ++j) m.v[half * 4 + j] = bits.v[j] >= threshold ? scale : 0.0f;
    }
    return m;
  }
};

// An adapter's factors in global memory.
struct FactorSource {
  const void *scale, *down, *up;
  DType type;
  int num_experts, rank;
};

inline AdapterDims dims_of(const AloreShape& s) {
  return {static_cast<int>(s.num_blocks), static_cast<int>(s.block_dim), static_cast<int>(s.width())};
}

inline FactorSource factors_of(const AloreShape& s, const AloreAdapter& a) {
  return {a.scale, a.down, a.up, s.factor, static_cast<int>(s.num_experts), static_cast<int>(s.rank)};
}

// f(Tag<In>, Tag<Out>) for the pairs that the fused kernels take: 16-bit throughout, or fp32 rows in.
template <typename F>
void dispatch_rows(DType input, DType output, F&& f) {
  const bool wide = input == DType::kFloat32;
  if (output == DType::kBFloat16) {
    wide ? f(Tag<float>{}, Tag<__nv_bfloat16>{}) : f(Tag<__nv_bfloat16>{}, Tag<__nv_bfloat16>{});
  } else {
    wide ? f(Tag<float>{}, Tag<__half>{}) : f(Tag<__half>{}, Tag<__half>{});
  }
}

// Loaded and converted apart, without a branch a type: the code stands in many places.
__device__ __forceinline__ uint32_t factor_bits(const void* p, bool wide, int i) {
  return wide ? __ldg(static_cast<const uint32_t*>(p) + i) : __ldg(static_cast<const uint16_t*>(p) + i);
}

__device__ __forceinline__ float factor_value(uint32_t bits, DType type) {
  const float half = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  return __uint_as_float(type == DType::kFloat32    ? bits
                         : type == DType::kBFloat16 ? bits << 16
                                                    : __float_as_uint(half));
}

// n / d for 0 <= n < 2^21, by one multiplication: the quotient's distance from an integer is at least 1 / (2
// d) once half is added, more than fp32 rounding can move it.
struct FastDivide {
  int divisor;
  float inverse;
  __device__ explicit FastDivide(int d) : divisor(d), inverse(1.0f / static_cast<float>(d)) {}
  __device__ __forceinline__ int quotient(int n) const {
    return static_cast<int>((static_cast<float>(n) + 0.5f) * inverse);
  }
};

// Calls put(i, source[i]) for every i < count, the block's threads side by side. A batch of loads is in
// flight before the first value is used.
template <typename Put>
__device__ __forceinline__ void scatter(const void* source, DType type, int count, Put put) {
  constexpr int kBatch = 8;
  const bool wide = type == DType::kFloat32;
#pragma unroll 1
  for (int first = threadIdx.x; first < count; first += kBatch * blockDim.x) {
    uint32_t bits[kBatch];
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = first + u * blockDim.x;
      bits[u] = i < count ? factor_bits(source, wide, i) : 0;
    }
#pragma unroll
    for (int u = 0; u < kBatch; ++u) {
      const int i = first + u * blockDim.x;
      if (i < count) put(i, factor_value(bits[u], type));
    }
  }
}

__device__ inline void fill_zero(unsigned char* shared, int bytes) {  // a multiple of 16
#pragma unroll 4
  for (int i = threadIdx.x * 16; i < bytes; i += blockDim.x * 16)
    *reinterpret_cast<uint4*>(shared + i) = {0, 0, 0, 0};
}

// Where entry i of a factor belongs: code column w, block column j.
struct CodePlace {
  int w, j;
};

struct DownPlace {  // down [num_experts, block_dim, rank]
  FastDivide expert, column;
  int rank;
  __device__ DownPlace(const AdapterDims& d, int r) : expert(d.block_dim * r), column(r), rank(r) {}
  __device__ __forceinline__ CodePlace operator()(int i) const {
    const int e = expert.quotient(i), rest = i - e * expert.divisor, j = column.quotient(rest);
    return {e * rank + rest - j * rank, j};
  }
};

struct UpPlace {  // up [num_experts, rank, block_dim]: code column w = expert * rank + k is row w
  FastDivide row;
  __device__ explicit UpPlace(const AdapterDims& d) : row(d.block_dim) {}
  __device__ __forceinline__ CodePlace operator()(int i) const {
    const int w = row.quotient(i);
    return {w, i - w * row.divisor};
  }
};

// Code image [padded_width, image_stride]: row w holds a factor's column w over the block, zeros outside. The
// B operand of products that sum over a block's columns: lane (g, c) reads 16 bytes, columns 8c .. 8c+7 of
// code column g.
__device__ __forceinline__ int code_image_at(const AdapterDims& d, CodePlace p) {
  return p.w * d.image_stride + p.j;
}

// Output image: the B operand of products that sum over the code, [code tile, column /
// 8][pair][parity][lane][8]: a lane's 16 bytes are its code columns 2c, 2c+1, 2c+8, 2c+9 for two neighbouring
// output tiles. Output tile t of a group holds columns 8c' + 2t and 8c' + 2t + 1 of the lanes c' = 0..3.
__device__ __forceinline__ int output_image_at(int chunks, int code_tile, int chunk, int pair, int parity,
                                               int c) {
  return ((((code_tile * chunks + chunk) * 2 + pair) * 2 + parity) * 4 + c) * 8;
}

__device__ __forceinline__ int output_image_at(const AdapterDims& d, CodePlace p) {
  const int u = p.w % kCodeTile, tile = p.j % 8 / 2;
  return output_image_at(d.chunks, p.w / kCodeTile, p.j / 8, tile / 2, p.j % 2, u % 8 / 2) + tile % 2 * 4 +
         u / 8 * 2 + u % 2;
}

// mixing[a, b, w] = scale[expert of w, a, b]; zeros were there before.
__device__ inline void fill_mixing(float* mixing, const AdapterDims& d, const FactorSource& f) {
  const int pairs = d.num_blocks * d.num_blocks;
  const FastDivide expert(pairs);
  scatter(f.scale, f.type, f.num_experts * pairs, [&](int i, float v) {
    const int e = expert.quotient(i), ab = i - e * pairs;
#pragma unroll 1
    for (int k = 0; k < f.rank; ++k) mixing[ab * d.padded_width + e * f.rank + k] = v;
  });
}

// The norm's weight or bias as floats, `missing` where there is none; zeros past the end.
__device__ inline void fill_affine(float* out, const void* vector, DType type, int dim, float missing) {
  if (vector == nullptr) {
    for (int i = threadIdx.x; i < dim; i += blockDim.x) out[i] = missing;
  } else {
    scatter(vector, type, dim, [&](int i, float v) { out[i] = v; });
  }
  if (threadIdx.x < kGroupColumns) out[dim + threadIdx.x] = 0.0f;
}

// code[16, 16 columns of `code_tile`] += values[16, 32] @ image: two mma in depth, two tiles in width. rows g
// and g+8 are 16-bit.
template <typename T>
__device__ __forceinline__ void accumulate_code(float (&code)[2][4], const uint4& row0, const uint4& row1,
                                                const T* image, int stride, int code_tile, int column,
                                                int g) {
  const uint32_t first[4] = {row0.x, row1.x, row0.y, row1.y};
  const uint32_t second[4] = {row0.z, row1.z, row0.w, row1.w};
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const uint4 b = load_shared_16(image + (code_tile * kCodeTile + n * 8 + g) * stride + column);
    mma<T>(code[n], first, b.x, b.y);
    mma<T>(code[n], second, b.z, b.w);
  }
}

// out[16, 32] += code[16, 16] @ image, where out[t][0..1] are columns 8c + 2t and the next of row g,
// out[t][2..3] of row g + 8.
template <typename T>
__device__ __forceinline__ void accumulate_output(float (&out)[4][4], const uint32_t (&code)[4],
                                                  const T* image, int chunks, int code_tile, int first_chunk,
                                                  int g, int c) {
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const uint4 b =
        load_shared_16(image + output_image_at(chunks, code_tile, first_chunk + g / 2, pair, g % 2, c));
    mma<T>(out[pair * 2], code, b.x, b.y);
    mma<T>(out[pair * 2 + 1], code, b.z, b.w);
  }
}

// Row g (upper = 0) or g + 8 (upper = 1) of an output tile.
__device__ __forceinline__ Eight output_row(const float (&out)[4][4], int upper) {
  Eight e;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    e.v[2 * t] = out[t][2 * upper];
    e.v[2 * t + 1] = out[t][2 * upper + 1];
  }
  return e;
}

__device__ __forceinline__ void set_output_row(float (&out)[4][4], int upper, const Eight& e) {
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    out[t][2 * upper] = e.v[2 * t];
    out[t][2 * upper + 1] = e.v[2 * t + 1];
  }
}

// Sum over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float v) {
  v += __shfl_xor_sync(0xffffffffu, v, 1);
  return v + __shfl_xor_sync(0xffffffffu, v, 2);
}

}  // namespace alore::kernels
