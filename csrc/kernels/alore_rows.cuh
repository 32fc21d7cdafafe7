// Rows held in registers by the fused forward: which of a row's columns a lane has, and the norm's statistics
// of them.
#pragma once

#include "kernels/alore_tile.cuh"
#include "kernels/row_moments.cuh"

namespace alore::kernels {

// Mean and reciprocal standard deviation of a row from every warp's own mean and squares around it (Chan's
// update: no second pass over the row, and no cancellation where the mean is large). The row's four lanes
// share the warps.
__device__ __forceinline__ RowNorm combine_statistics(const float2* partial, const float* columns, int warps,
                                                      int row, int c, float total, float eps) {
  float2 own[2]{};
  float weight[2]{}, mean = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int v = c + i * 4;
    if (v >= warps) continue;
    own[i] = partial[v * kTileRows + row];
    weight[i] = columns[v];
    mean += weight[i] * own[i].x;
  }
  mean = row_sum(mean) / total;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) squares += own[i].y + weight[i] * (own[i].x - mean) * (own[i].x - mean);
  return {mean, 1.0f / sqrtf(row_sum(squares) / total + eps)};
}

// Makes the compiler unpack the rows again at their next use: kept in fp32 between passes they would not fit
// the registers. Costs nothing at run time.
template <typename In, int kGroups>
__device__ __forceinline__ void forget_unpacked(Raw8<In> (&raw)[kGroups][2]) {
  if constexpr (!std::is_same_v<In, float>) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint4& q = raw[i][r].q;
        asm volatile("" : "+r"(q.x), "+r"(q.y), "+r"(q.z), "+r"(q.w));
      }
    }
  }
}

// Walks a warp's groups: which block each lies in and which of the block's groups it is. kEven: blocks are
// whole groups and every warp has its full count, so that columns follow each other without a gap and all are
// real.
template <bool kEven>
struct GroupWalk {
  int block, local, per_block;
  int start,
      steps = 0;  // column of the first group; groups since then, a constant where the loop is unrolled
  __device__ GroupWalk(int first, int groups_per_block, int c)
      : block(first / groups_per_block),
        local(first % groups_per_block),
        per_block(groups_per_block),
        start(first * kGroupColumns + c * 8) {}
  // From the first group again. The compiler must not know that: it would keep every group's addresses in
  // registers from tile to tile, and spill the rows instead.
  __device__ void restart(const GroupWalk& first) {
    *this = first;
    asm volatile("" : "+r"(block), "+r"(local), "+r"(start));
  }
  __device__ void next() {
    if (++local == per_block) local = 0, ++block;
    ++steps;
  }
  __device__ bool live(const AdapterDims& d) const { return kEven || block < d.num_blocks; }
  // Of this lane's eight columns: their place in the block, and whether they exist.
  __device__ int in_block(int c) const { return local * kGroupColumns + c * 8; }
  __device__ bool inside(const AdapterDims& d, int c) const {
    return kEven || (live(d) && in_block(c) < d.block_dim);
  }
  // Those eight columns of a row. Even walks step by a constant, which the address takes as an immediate.
  template <typename T>
  __device__ T* in_row(T* row, const AdapterDims& d, int c) const {
    if constexpr (kEven) return row + start + steps * kGroupColumns;
    return row + (inside(d, c) ? block * d.block_dim + in_block(c) : 0);
  }
};

// Mean of rows g and g + 8 over this warp's columns and the sum of squares around it, in all lanes of the
// row.
struct RowMoments {
  float mean0, mean1, squares0, squares1;
};

// The exact way: a second pass over the rows, centred.
template <typename In, int kGroups, bool kEven>
__device__ __forceinline__ void centred_squares(const Raw8<In> (&raw)[kGroups][2], RowMoments& m,
                                                const GroupWalk<kEven>& first, const AdapterDims& d, int c) {
  m.squares0 = m.squares1 = 0.0f;
  GroupWalk<kEven> walk = first;
  walk.restart(first);
#pragma unroll
  for (int i = 0; i < kGroups; ++i, walk.next()) {
    const Eight a = raw[i][0].floats(), b = raw[i][1].floats();
    const float inside = walk.inside(d, c) ? 1.0f : 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float u = (a.v[j] - m.mean0) * inside, w = (b.v[j] - m.mean1) * inside;
      m.squares0 += u * u;
      m.squares1 += w * w;
    }
  }
  m.squares0 = row_sum(m.squares0);
  m.squares1 = row_sum(m.squares1);
}

// For 16-bit rows both sums are products that the tensor cores take: with ones, and with the rows themselves,
// whose diagonal is the sum of squares. That sum is not centred: where the mean outweighs the spread enough
// to cost precision, the warp goes over the rows again.
template <typename In, int kGroups, bool kEven>
__device__ __forceinline__ RowMoments row_moments(Raw8<In> (&raw)[kGroups][2], float columns,
                                                  const GroupWalk<kEven>& first, const AdapterDims& d,
                                                  int c) {
  RowMoments m;
  const float share = 1.0f / columns;
  if constexpr (std::is_same_v<In, float>) {
    float sum0 = 0.0f, sum1 = 0.0f;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        sum0 += raw[i][0].e.v[j];
        sum1 += raw[i][1].e.v[j];
      }
    }
    m.mean0 = row_sum(sum0) * share;
    m.mean1 = row_sum(sum1) * share;
    centred_squares(raw, m, first, d, c);
  } else {
    // Each product takes eight columns of one row as they lie in registers: two of them as rows g and g + 8
    // of its A, so that no register moves and both halves of the result belong to the same row.
    const uint32_t ones = pack2<In>(1.0f, 1.0f);
    float sum0[4] = {}, sum1[4] = {}, gram0[4] = {}, gram1[4] = {}, more0[4] = {}, more1[4] = {};
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const uint4 &a = raw[i][0].q, &b = raw[i][1].q;
      mma<In>(sum0, {a.x, a.y, a.z, a.w}, ones, ones);
      mma<In>(sum1, {b.x, b.y, b.z, b.w}, ones, ones);
      mma8<In>(gram0, a.x, a.y, a.x);
      mma8<In>(more0, a.x, a.y, a.y);
      mma8<In>(gram1, b.x, b.y, b.x);
      mma8<In>(more1, b.x, b.y, b.y);
      mma8<In>(gram0, a.z, a.w, a.z);
      mma8<In>(more0, a.z, a.w, a.w);
      mma8<In>(gram1, b.z, b.w, b.z);
      mma8<In>(more1, b.z, b.w, b.w);
    }
    m.mean0 = (sum0[0] + sum0[2]) * share;
    m.mean1 = (sum1[0] + sum1[2]) * share;
    // Row g's entry of a diagonal is with lane g / 2 of its four.
    const int lane = threadIdx.x % 32, g = lane / 4, from = (lane & ~3) | g / 2;
    const float diagonal0 = __shfl_sync(0xffffffffu, g % 2 ? gram0[1] + more0[3] : gram0[0] + more0[2], from);
    const float diagonal1 = __shfl_sync(0xffffffffu, g % 2 ? gram1[1] + more1[3] : gram1[0] + more1[2], from);
    const float shift0 = columns * m.mean0 * m.mean0, shift1 = columns * m.mean1 * m.mean1;
    m.squares0 = fmaxf(diagonal0 - shift0, 0.0f);
    m.squares1 = fmaxf(diagonal1 - shift1, 0.0f);
    const bool precise = shift0 <= kMaxShift * m.squares0 && shift1 <= kMaxShift * m.squares1;
    if (!__all_sync(0xffffffffu, precise)) centred_squares(raw, m, first, d, c);
    forget_unpacked(raw);
  }
  return m;
}

// row += residual, rounded as a sum of its own would be, and kept.
template <typename In>
__device__ __forceinline__ void add_residual(Raw8<In>& row, const In* residual, In* sum) {
  Raw8<In> other;
  other.load(residual);
  Eight s = row.floats();
  const Eight o = other.floats();
#pragma unroll
  for (int j = 0; j < 8; ++j) s.v[j] += o.v[j];
  row.set(s);
  row.store(sum);
}

}  // namespace alore::kernels
