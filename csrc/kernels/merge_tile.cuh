// What a grouped merge computes on one tile: encode, mix, decode. merge_stage.cuh holds its memory.
#pragma once

#include "kernels/merge_stage.cuh"

namespace alore::kernels {

template <typename T, bool kAlong>
struct MergeTile : MergeStage<T, kAlong> {
  using Stage = MergeStage<T, kAlong>;
  using Stage::block_of, Stage::stage_index, Stage::load_chunk, Stage::store_chunk, Stage::factor_index;
  using Stage::code, Stage::factors, Stage::mixed;
  using Stage::column_offset, Stage::load_factor, Stage::read, Stage::read_unit;
  using Stage::entry, Stage::thread, Stage::group, Stage::tokens, Stage::live, Stage::token0, Stage::stage;
  using Stage::Stage, Stage::kRows, Stage::kUnit, Stage::kAccVector, Stage::kCodeStride,
      Stage::kFactorElements;
  using Stage::steps, Stage::mixed_elements, Stage::factor_capacity, Stage::row, Stage::has_row,
      Stage::row_within;
  using typename Stage::Acc, typename Stage::Vector;
  static constexpr int kGroupColumns = kMergeColumns / kMergeGroups;
  static_assert(kGroupColumns % kAccVector == 0);

  // code[row, c] = sum_x token[row, x] * enc(x, column0 + c), in the order of x.
  __device__ void encode(int column0) const {
    const int rows = entry.s_in * tokens;
    const int column = column_offset(entry.enc, column0);
    Acc sum[kRows][kGroupColumns] = {};
    for (int x0 = 0; x0 < entry.p_in; x0 += kMergeChunk) {
      __syncthreads();
      load_chunk(entry.s_in, entry.p_in, x0);
      load_factor(entry.enc, column, entry.p_in, x0, factors);
      wait_for_copies();
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

  // h[j][c] = sum_i scale(e, i, block) * code[(i, token), c] for this thread's output rows, in the order of
  // i.
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
        const int64_t at = static_cast<int64_t>(n / entry.rank) * entry.scale.stride_e +
                           i * entry.scale.stride_x + b * entry.scale.stride_k;
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
    const Acc coeff =
        there ? load_as<Acc>(entry.factor, entry.scale.data, static_cast<int64_t>(n) * entry.scale.stride_k)
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
        load_factor(entry.dec, step == 0 ? column : column_offset(entry.dec, step * kMergeColumns),
                    entry.p_out, x0, factors + step * kFactorElements);
      }
      wait_for_copies();
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
    Vector out;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) out.value[i] = convert<T>(x[i] + sum[i]);
    if constexpr (kAlong) {
      *reinterpret_cast<Vector*>(stage + stage_index(r, unit * kUnit, rows)) = out;
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
