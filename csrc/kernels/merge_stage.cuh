// A tile of a grouped merge in a thread block's memory: which rows a thread has, and how chunks of tokens and
// factors come and go. merge_tile.cuh computes on them.
//
// A tile is tokens_per_tile tokens, each cut into blocks; a (block, token) pair is a row, row = block *
// tokens_per_tile + token. Threads stand in kMergeGroups groups. A thread of every group holds the same rows,
// kRows of them spread over the tile; the groups share out code columns while encoding and elements while
// decoding. Factors are read by all threads of a group at one address, which shared memory answers at once.
//
// Tokens are read twice, to encode and to add the update: 64 tokens of 768 in each of the 500 blocks of a
// GPU are about what its L2 holds.
#pragma once

#include "kernels/async_copy.cuh"
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
struct MergeStage {
  using Acc = acc_t<T>;
  static constexpr DType kType = dtype_of<T>();
  static constexpr DType kAcc = accumulate_type(kType);
  static constexpr int kRows = merge_rows_per_thread(kAcc);
  static constexpr int kRowThreads = kMergeThreads / kMergeGroups;
  static constexpr int kUnit = merge_vector(kType);  // elements that a thread works through at a time
  static constexpr int kAccVector = merge_vector(kAcc);
  static constexpr int kStageStride = merge_stage_stride(kType);
  static constexpr int kCodeStride = merge_code_stride(kAcc);
  static constexpr int kFactorElements = merge_factor_elements(kType, kAcc);
  using Vector = MergeVector<T, kUnit>;

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

  __device__ MergeStage(const MergeEntry& e, int tile, unsigned char* shared)
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

  // Row j of this thread. The tile may not have it: what is then read is some of the tile's memory, and
  // nothing may be written.
  __device__ int row(int j) const { return first_row + j * kRowThreads; }
  __device__ bool has_row(int j, int rows) const { return row(j) < rows; }
  // The same for arrays that end with the tile's rows.
  __device__ int row_within(int j, int rows) const { return has_row(j, rows) ? row(j) : 0; }
  __device__ int block_of(int r) const { return (r * inverse) >> 16; }

  __device__ int stage_index(int r, int x, int rows) const {
    return kAlong ? r * kStageStride + x : x * rows + r;
  }

  // From the tile's first token, in elements. plan_merge sees to it that 32 bits hold it. Vectors lie along
  // the axis whose stride is 1.
  template <int N>
  __device__ int offset(int token, int element) const {
    const int token_stride = static_cast<int>(entry.token_stride),
              stride = static_cast<int>(entry.element_stride);
    if constexpr (N == 1) return token * token_stride + element * stride;
    if constexpr (kAlong) return token * token_stride + element;
    return token + element * stride;
  }

  // Calls f(staged, global, count) for every N neighbours of the chunk [x0, x0 + kMergeChunk) of every block:
  // the first `count` of them, 0 to N, are there in `data`, the entry's source or target; with none, `global`
  // is any address of it.
  template <int N, typename Global, typename F>
  __device__ void walk(Global* data, int blocks, int p, int x0, F&& f) const {
    const int rows = blocks * tokens, valid = p - x0;
    data += token0 * entry.token_stride;
    if constexpr (kAlong) {
      constexpr int kPerRow = kMergeChunk / N;
#pragma unroll 1  // asynchronous copies do not wait for each other, and registers are short
      for (int i = thread; i < rows * kPerRow; i += kMergeThreads) {
        const int r = i / kPerRow, x = i % kPerRow * N;
        const int block = block_of(r), t = r - block * tokens;
        const int count = t < live && x < valid ? N : 0;
        f(stage + stage_index(r, x, rows), data + (count > 0 ? offset<N>(t, block * p + x0 + x) : 0), count);
      }
    } else {
#pragma unroll 1
      for (int r = thread % 32 * N; r < rows; r += 32 * N) {
        const int block = block_of(r), t = r - block * tokens;
        const int there = live - t < 0 ? 0 : live - t < N ? live - t : N;
#pragma unroll 1
        for (int x = thread / 32; x < kMergeChunk; x += kMergeThreads / 32) {
          const int count = x < valid ? there : 0;
          f(stage + stage_index(r, x, rows), data + (count > 0 ? offset<N>(t, block * p + x0 + x) : 0),
            count);
        }
      }
    }
  }

  template <int N>
  __device__ void load_chunk(int blocks, int p, int x0) const {
    const auto* source = static_cast<const T*>(entry.memory.source);
    walk<N>(source, blocks, p, x0, [](T* staged, const T* global, int count) {
      if constexpr (N > 1) {
        if (kAlong || count == N || count == 0) return copy_async_16(staged, global, count != 0);
      }
      if constexpr (N == 1 || !kAlong) {
#pragma unroll
        for (int i = 0; i < N; ++i) staged[i] = i < count ? global[i] : convert<T>(0.0f);
      }
    });
  }

  template <int N>
  __device__ void store_chunk(int blocks, int p, int x0) const {
    auto* target = static_cast<T*>(entry.memory.target);
    walk<N>(target, blocks, p, x0, [](const T* staged, T* global, int count) {
      if constexpr (N > 1) {
        // Streamed: nobody reads it again here, and the L2 cache has the sources to keep.
        if (count == N)
          return __stcs(reinterpret_cast<uint4*>(global), *reinterpret_cast<const uint4*>(staged));
      }
      if constexpr (N == 1 || !kAlong) {
        for (int i = 0; i < count; ++i) global[i] = staged[i];
      }
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

  static __device__ __forceinline__ void unpack(const T* from, Acc (&to)[kUnit]) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      // A bfloat16 is the upper half of a float: one instruction each, where picking a half first takes two.
      const auto words = *reinterpret_cast<const MergeVector<unsigned, kUnit / 2>*>(from);
#pragma unroll
      for (int i = 0; i < kUnit / 2; ++i) {
        to[2 * i] = __uint_as_float(words.value[i] << 16);
        to[2 * i + 1] = __uint_as_float(words.value[i] & 0xffff0000u);
      }
    } else {
      const auto vector = *reinterpret_cast<const Vector*>(from);
#pragma unroll
      for (int i = 0; i < kUnit; ++i) to[i] = convert<Acc>(vector.value[i]);
    }
  }

  __device__ __forceinline__ void read_unit(int r, int unit, int rows, Acc (&to)[kUnit]) const {
    if constexpr (kAlong) {
      unpack(stage + stage_index(r, unit * kUnit, rows), to);
    } else {
#pragma unroll
      for (int i = 0; i < kUnit; ++i) to[i] = convert<Acc>(stage[stage_index(r, unit * kUnit + i, rows)]);
    }
  }
};

}  // namespace alore::kernels
