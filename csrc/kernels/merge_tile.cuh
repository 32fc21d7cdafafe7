// One tile of a grouped merge: how a thread block moves tokens, and what it computes on them.
//
// A tile is tokens_per_tile tokens, each cut into blocks; a (block, token) pair is a row, row = block *
// tokens_per_tile + token. Threads stand in kMergeGroups groups. A thread of every group holds the same rows,
// kRows of them spread over the tile; the groups share out code columns while encoding and elements while
// decoding. Factors are read by all threads of a group at one address, which shared memory answers at once.
//
// Tokens are read twice, to encode and to add the update: 64 tokens of 768 in each of the 500 blocks of a
// GPU are about what its L2 holds.
#pragma once

#include <cuda_pipeline.h>

#include "kernels/cuda_common.cuh"
#include "kernels/merge.h"

namespace alore::kernels {

template <typename T, int N>
struct alignas(N * sizeof(T)) MergeVector {
  T value[N];
};

template <typename T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, double>) return DType::kFloat64;
  if constexpr (std::is_same_v<T, float>) return DType::kFloat32;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return DType::kBFloat16;
  return DType::kFloat16;
}

template <typename Acc>
__device__ __forceinline__ Acc load_as(DType type, const void* data, int64_t index) {
  switch (type) {
    case DType::kFloat64:
      return convert<Acc>(static_cast<const double*>(data)[index]);
    case DType::kFloat32:
      return convert<Acc>(static_cast<const float*>(data)[index]);
    case DType::kBFloat16:
      return convert<Acc>(static_cast<const __nv_bfloat16*>(data)[index]);
    default:
      return convert<Acc>(static_cast<const __half*>(data)[index]);
  }
}

// kAlong: the staged chunk is [row, element] and neighbouring threads read along a token; otherwise it is
// [element, row] and they read across tokens.
template <typename T, bool kAlong>
struct MergeTile {
  using Acc = acc_t<T>;
  static constexpr DType kType = dtype_of<T>();
  static constexpr DType kAcc = accumulate_type(kType);
  static constexpr int kRows = merge_rows_per_thread(kAcc);
  static constexpr int kRowThreads = kMergeThreads / kMergeGroups;
  static constexpr int kUnit = merge_vector(kType);  // elements that a thread works through at a time
  static constexpr int kUnits = kMergeChunk / kUnit;
  static constexpr int kAccVector = merge_vector(kAcc);
  static constexpr int kGroupColumns = kMergeColumns / kMergeGroups;
  static constexpr int kStageStride = merge_stage_stride(kType);
  static constexpr int kCodeStride = merge_code_stride(kAcc);
  static constexpr int kFactorElements = merge_factor_elements(kType, kAcc);
  static_assert(kGroupColumns % kAccVector == 0 && kMergeColumns <= kMergeThreads);

  const MergeEntry& entry;
  int thread, group, first_row;  // this thread's; its rows are first_row + j * kRowThreads
  int64_t token0;                // the tile's first token
  int live;                      // its tokens: tokens_per_tile, fewer in the last tile
  int tokens;                    // tokens_per_tile
  int inverse;                   // block of row r < 256: (r * inverse) >> 16
  T* stage;                      // a chunk of all rows; between encoding and mixing, the code
  Acc* code;
  Acc* factors;
  Acc* mixed;  // [steps, row, kCodeStride], where the code takes several steps

  __device__ MergeTile(const MergeEntry& e, int tile, unsigned char* shared)
      : entry(e), thread(static_cast<int>(threadIdx.x)), tokens(e.tokens_per_tile) {
    constexpr int kRowsInWarp = 32 / kMergeGroups;
    const int lane = thread % 32;
    group = lane / kRowsInWarp;
    first_row = thread / 32 * kRowsInWarp + lane % kRowsInWarp;
    token0 = static_cast<int64_t>(tile) * tokens;
    const int64_t left = e.num_tokens - token0;
    live = static_cast<int>(left < tokens ? left : tokens);
    inverse = (65536 + tokens - 1) / tokens;

    stage = reinterpret_cast<T*>(shared);
    code = reinterpret_cast<Acc*>(shared);
    factors = reinterpret_cast<Acc*>(shared + merge_stage_bytes(kType));
    mixed = factors + factor_capacity();
  }

  __device__ int steps() const { return (entry.code_width + kMergeColumns - 1) / kMergeColumns; }
  __device__ int mixed_elements() const {
    return tokens * (entry.s_in > entry.s_out ? entry.s_in : entry.s_out) * kCodeStride;
  }
  __device__ int factor_capacity() const {
    const int by_chunk = steps() * kFactorElements, by_block = entry.s_out * kMergeColumns;
    return by_chunk > by_block ? by_chunk : by_block;
  }

  // Row j of this thread. The tile may not have it: what is then read is some of the tile's memory, and nothing
  // may be written.
  __device__ int row(int j) const { return first_row + j * kRowThreads; }
  __device__ bool has_row(int j, int rows) const { return row(j) < rows; }
  // The same for arrays that end with the tile's rows.
  __device__ int row_within(int j, int rows) const { return has_row(j, rows) ? row(j) : 0; }
  __device__ int block_of(int r) const { return (r * inverse) >> 16; }

  __device__ int stage_index(int r, int x, int rows) const { return kAlong ? r * kStageStride + x : x * rows + r; }

  // From the tile's first token, in elements. plan_merge sees to it that 32 bits hold it. Vectors lie along the
  // axis whose stride is 1.
  template <int N>
  __device__ int offset(int token, int element) const {
    const int token_stride = static_cast<int>(entry.token_stride), stride = static_cast<int>(entry.element_stride);
    if constexpr (N == 1) return token * token_stride + element * stride;
    if constexpr (kAlong) return token * token_stride + element;
    return token + element * stride;
  }

  // Calls f(staged, global, count) for every N neighbours of the chunk [x0, x0 + kMergeChunk) of every block:
  // the first `count` of them, 0 to N, are there in the target.
  template <int N, typename F>
  __device__ void walk(int blocks, int p, int x0, F&& f) const {
    const int rows = blocks * tokens, valid = p - x0;
    T* target = static_cast<T*>(entry.target) + token0 * entry.token_stride;
    if constexpr (kAlong) {
      constexpr int kPerRow = kMergeChunk / N;
#pragma unroll 1  // copies do not wait for each other, and registers are short
      for (int i = thread; i < rows * kPerRow; i += kMergeThreads) {
        const int r = i / kPerRow, x = i % kPerRow * N;
        const int block = block_of(r), t = r - block * tokens;
        f(stage + stage_index(r, x, rows), target + offset<N>(t, block * p + x0 + x), t < live && x < valid ? N : 0);
      }
    } else {
#pragma unroll 1
      for (int r = thread % 32 * N; r < rows; r += 32 * N) {
        const int block = block_of(r), t = r - block * tokens;
        const int there = live - t < 0 ? 0 : live - t < N ? live - t : N;
#pragma unroll 1
        for (int x = thread / 32; x < kMergeChunk; x += kMergeThreads / 32) {
          f(stage + stage_index(r, x, rows), target + offset<N>(t, block * p + x0 + x), x < valid ? there : 0);
        }
      }
    }
  }

  template <int N>
  __device__ void load_chunk(int blocks, int p, int x0) const {
    walk<N>(blocks, p, x0, [](T* staged, const T* global, int count) {
      if (N > 1 && count == N) {
        __pipeline_memcpy_async(staged, global, N * sizeof(T));
        return;
      }
#pragma unroll
      for (int i = 0; i < N; ++i) staged[i] = i < count ? global[i] : convert<T>(0.0f);
    });
    __pipeline_commit();
  }

  template <int N>
  __device__ void store_chunk(int blocks, int p, int x0) const {
    walk<N>(blocks, p, x0, [](const T* staged, T* global, int count) {
      if (N > 1 && count == N) {
        using Vector = MergeVector<T, N>;
        *reinterpret_cast<Vector*>(global) = *reinterpret_cast<const Vector*>(staged);
        return;
      }
      for (int i = 0; i < count; ++i) global[i] = staged[i];
    });
  }

  __device__ void load_chunk(int blocks, int p, int x0) const {
    entry.vectors ? load_chunk<kUnit>(blocks, p, x0) : load_chunk<1>(blocks, p, x0);
  }
  __device__ void store_chunk(int blocks, int p, int x0) const {
    entry.vectors ? store_chunk<kUnit>(blocks, p, x0) : store_chunk<1>(blocks, p, x0);
  }

  static __device__ int factor_index(int x) { return x * kMergeColumns + x / kUnit * kAccVector; }

  // Where this thread's column of a factor begins, or -1 where there is none.
  __device__ int column_offset(const MergeFactor& factor, int column0) const {
    const int n = column0 + thread % kMergeColumns, e = n / entry.rank;
    return n < entry.code_width ? e * factor.stride_e + (n - e * entry.rank) * factor.stride_k : -1;
  }

  // out[factor_index(x) + c] = factor(x0 + x, column0 + c), 0 beyond the factor's ends.
  template <typename F>
  __device__ void load_factor_from(const F* data, int column, int stride, int p, int x0, Acc* out) const {
    constexpr int kStep = kMergeThreads / kMergeColumns;
    const int c = thread % kMergeColumns, first = thread / kMergeColumns;
    Acc value[kMergeChunk / kStep];  // all loads before the first store, so that they wait together
#pragma unroll
    for (int i = 0; i < kMergeChunk / kStep; ++i) {
      const int x = x0 + first + i * kStep;
      value[i] = column >= 0 && x < p ? convert<Acc>(data[column + x * stride]) : Acc(0);
    }
#pragma unroll
    for (int i = 0; i < kMergeChunk / kStep; ++i) out[factor_index(first + i * kStep) + c] = value[i];
  }

  __device__ void load_factor(const MergeFactor& factor, int column, int p, int x0, Acc* out) const {
    const int stride = factor.stride_x;
    switch (entry.factor) {
      case DType::kFloat64:
        if constexpr (std::is_same_v<Acc, double>) {  // plan_merge takes no others
          load_factor_from(static_cast<const double*>(factor.data), column, stride, p, x0, out);
        }
        return;
      case DType::kFloat32:
        return load_factor_from(static_cast<const float*>(factor.data), column, stride, p, x0, out);
      case DType::kBFloat16:
        return load_factor_from(static_cast<const __nv_bfloat16*>(factor.data), column, stride, p, x0, out);
      default:
        return load_factor_from(static_cast<const __half*>(factor.data), column, stride, p, x0, out);
    }
  }

  // `count` values in vectors of 16 bytes.
  template <int count>
  static __device__ __forceinline__ void read(const Acc* from, Acc (&to)[count]) {
#pragma unroll
    for (int i = 0; i < count; i += kAccVector) {
      const auto vector = *reinterpret_cast<const MergeVector<Acc, kAccVector>*>(from + i);
#pragma unroll
      for (int j = 0; j < kAccVector; ++j) to[i + j] = vector.value[j];
    }
  }

  __device__ __forceinline__ void read_unit(int r, int unit, int rows, Acc (&to)[kUnit]) const {
    if constexpr (kAlong) {
      const T* from = stage + stage_index(r, unit * kUnit, rows);
      const auto vector = *reinterpret_cast<const MergeVector<T, kUnit>*>(from);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) to[i] = convert<Acc>(vector.value[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) to[i] = convert<Acc>(stage[stage_index(r, unit * kUnit + i, rows)]);
    }
  }

  // code[row, c] = sum_x token[row, x] * enc(x, column0 + c), in the order of x.
  __device__ void encode(int column0) const {
    const int rows = entry.s_in * tokens;
    const int column = column_offset(entry.enc, column0);
    Acc sum[kRows][kGroupColumns] = {};
    for (int x0 = 0; x0 < entry.p_in; x0 += kMergeChunk) {
      __syncthreads();
      load_chunk(entry.s_in, entry.p_in, x0);
      load_factor(entry.enc, column, entry.p_in, x0, factors);
      __pipeline_wait_prior(0);
      __syncthreads();
      const int valid = entry.p_in - x0 < kMergeChunk ? entry.p_in - x0 : kMergeChunk;
#pragma unroll 1
      for (int unit = 0; unit * kUnit < valid; ++unit) {
        Acc x[kRows][kUnit];
#pragma unroll
        for (int j = 0; j < kRows; ++j) read_unit(row(j), unit, rows, x[j]);
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
          Acc f[kGroupColumns];
          read(factors + factor_index(unit * kUnit + i) + group * kGroupColumns, f);
#pragma unroll
          for (int j = 0; j < kRows; ++j) {
#pragma unroll
            for (int c = 0; c < kGroupColumns; ++c) sum[j][c] += x[j][i] * f[c];
          }
        }
      }
    }
    __syncthreads();  // the code takes the place of the last chunk
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (!has_row(j, rows)) continue;
#pragma unroll
      for (int c = 0; c < kGroupColumns; ++c) {
        code[row(j) * kCodeStride + group * kGroupColumns + c] = sum[j][c];
      }
    }
    __syncthreads();
  }

  // h[j][c] = sum_i scale(e, i, block) * code[(i, token), c] for this thread's output rows, in the order of i.
  __device__ void mix(int column0, Acc (&h)[kRows][kMergeColumns]) const {
    const int rows = entry.s_out * tokens, s_out = entry.s_out;
    const int at_once = factor_capacity() / (s_out * kMergeColumns);
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
#pragma unroll
      for (int c = 0; c < kMergeColumns; ++c) h[j][c] = Acc(0);
    }
    for (int i0 = 0; i0 < entry.s_in; i0 += at_once) {
      const int count = entry.s_in - i0 < at_once ? entry.s_in - i0 : at_once;
      __syncthreads();
      for (int index = thread; index < count * s_out * kMergeColumns; index += kMergeThreads) {
        const int n = column0 + index % kMergeColumns, pair = index / kMergeColumns;
        const int64_t i = i0 + pair / s_out, b = pair % s_out;
        const int64_t at = static_cast<int64_t>(n / entry.rank) * entry.scale.stride_e + i * entry.scale.stride_x +
                           b * entry.scale.stride_k;
        factors[index] = n < entry.code_width ? load_as<Acc>(entry.factor, entry.scale.data, at) : Acc(0);
      }
      __syncthreads();
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          const int r = row_within(j, rows), b = block_of(r), t = r - b * tokens;
          Acc z[kMergeColumns], s[kMergeColumns];
          read(code + ((i0 + i) * tokens + t) * kCodeStride, z);
          read(factors + (i * s_out + b) * kMergeColumns, s);
#pragma unroll
          for (int c = 0; c < kMergeColumns; ++c) h[j][c] += s[c] * z[c];
        }
      }
    }
  }

  // h[j][c] = B[token, n] * coeff[n], the code of a low-rank merge.
  __device__ void read_code(int column0, Acc (&h)[kRows][kMergeColumns]) const {
    const int c = thread % kMergeColumns, n = column0 + c;
    const bool there = n < entry.code_width;
    const Acc coeff = there ? load_as<Acc>(entry.factor, entry.scale.data, static_cast<int64_t>(n) * entry.scale.stride_k)
                            : Acc(0);
    __syncthreads();
#pragma unroll 1
    for (int t = thread / kMergeColumns; t < tokens; t += kMergeThreads / kMergeColumns) {
      const int64_t at = (token0 + t) * entry.enc.stride_x + static_cast<int64_t>(n) * entry.enc.stride_k;
      code[t * kCodeStride + c] =
          there && t < live ? load_as<Acc>(entry.factor, entry.enc.data, at) * coeff : Acc(0);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kRows; ++j) read(code + row_within(j, tokens) * kCodeStride, h[j]);
  }

  __device__ void keep(int step, const Acc (&h)[kRows][kMergeColumns]) const {
    if (group != 0) return;
    const int rows = entry.s_out * tokens;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (!has_row(j, rows)) continue;
#pragma unroll
      for (int c = 0; c < kMergeColumns; ++c) {
        mixed[step * mixed_elements() + row(j) * kCodeStride + c] = h[j][c];
      }
    }
  }

  // token[row, x] += sum_n h[row, n] * dec(x, n) for x in [begin, end), in the order of n, rounded once.
  __device__ void decode(int begin, int end, Acc (&h)[kRows][kMergeColumns]) const {
    const int rows = entry.s_out * tokens, count = steps();
    const int column = column_offset(entry.dec, 0);
    for (int x0 = begin; x0 < end; x0 += kMergeChunk) {
      __syncthreads();
      load_chunk(entry.s_out, entry.p_out, x0);
      for (int step = 0; step < count; ++step) {
        load_factor(entry.dec, step == 0 ? column : column_offset(entry.dec, step * kMergeColumns), entry.p_out, x0,
                    factors + step * kFactorElements);
      }
      __pipeline_wait_prior(0);
      __syncthreads();
      const int valid = end - x0 < kMergeChunk ? end - x0 : kMergeChunk;
#pragma unroll 1
      for (int unit = group; unit * kUnit < valid; unit += kMergeGroups) {
        Acc sum[kRows][kUnit] = {};
#pragma unroll 1
        for (int step = 0; step < count; ++step) {
          if (count > 1) {
#pragma unroll
            for (int j = 0; j < kRows; ++j) {
              read(mixed + step * mixed_elements() + row_within(j, rows) * kCodeStride, h[j]);
            }
          }
#pragma unroll
          for (int i = 0; i < kUnit; ++i) {
            Acc f[kMergeColumns];
            read(factors + step * kFactorElements + factor_index(unit * kUnit + i), f);
#pragma unroll
            for (int j = 0; j < kRows; ++j) {
#pragma unroll
              for (int c = 0; c < kMergeColumns; ++c) sum[j][i] += h[j][c] * f[c];
            }
          }
        }
#pragma unroll
        for (int j = 0; j < kRows; ++j) {
          if (has_row(j, rows)) add_unit(row(j), unit, rows, sum[j]);
        }
      }
      __syncthreads();
      store_chunk(entry.s_out, entry.p_out, x0);
    }
  }

  __device__ __forceinline__ void add_unit(int r, int unit, int rows, const Acc (&sum)[kUnit]) const {
    Acc x[kUnit];
    read_unit(r, unit, rows, x);
    MergeVector<T, kUnit> out;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) out.value[i] = convert<T>(x[i] + sum[i]);
    if constexpr (kAlong) {
      *reinterpret_cast<MergeVector<T, kUnit>*>(stage + stage_index(r, unit * kUnit, rows)) = out;
    } else {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) stage[stage_index(r, unit * kUnit + i, rows)] = out.value[i];
    }
  }

  __device__ void run(int split) const {
    Acc h[kRows][kMergeColumns];
#pragma unroll 1
    for (int step = 0; step < steps(); ++step) {
      if (entry.low_rank) {
        read_code(step * kMergeColumns, h);
      } else {
        encode(step * kMergeColumns);
        mix(step * kMergeColumns, h);
      }
      if (steps() > 1) keep(step, h);
    }
    const int begin = entry.low_rank ? split * kMergeSplit : 0;
    const int end = entry.low_rank && begin + kMergeSplit < entry.p_out ? begin + kMergeSplit : entry.p_out;
    decode(begin, end, h);
  }
};

template <typename T>
__global__ void __launch_bounds__(kMergeThreads, sizeof(T) == 8 ? 2 : 4)
    merge_kernel(const __grid_constant__ MergeTable table) {
  extern __shared__ __align__(16) unsigned char merge_shared[];
  const int tile = static_cast<int>(blockIdx.x);
  int index = 0;
  while (index + 1 < table.count && table.entries[index + 1].first_tile <= tile) ++index;
  const MergeEntry& entry = table.entries[index];
  const int own = tile - entry.first_tile, split = own % entry.splits;
  if (entry.rows) {
    MergeTile<T, true>(entry, own / entry.splits, merge_shared).run(split);
  } else {
    MergeTile<T, false>(entry, own / entry.splits, merge_shared).run(split);
  }
}

}  // namespace alore::kernels
