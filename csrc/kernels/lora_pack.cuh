// The factors as products read them: the coefficients and this step's mask inside, 16 bytes a thread.
#pragma once

#include "kernels/lora_mma.cuh"

namespace alore::kernels {

template <typename Factor>
struct CoefficientArgs {
  using Acc = acc_t<Factor>;
  const Factor* coeff;
  const Acc* mask;
  Acc* mask_out;
  bool draw;
  uint32_t threshold;  // drop_threshold(p)
  Acc kept;            // 1 / (1 - p)
  PhiloxSource philox;
  int64_t rank, expert_rank;

  CoefficientArgs(const LoraShape& s, const Coefficients& c)
      : coeff(static_cast<const Factor*>(c.coeff)),
        mask(static_cast<const Acc*>(c.mask)),
        mask_out(static_cast<Acc*>(c.mask_out)),
        draw(c.draw),
        threshold(drop_threshold(c.p)),
        kept(static_cast<Acc>(1.0 / (1.0 - c.p))),
        philox(c.philox),
        rank(s.rank),
        expert_rank(s.expert_rank) {}

  __device__ __forceinline__ Acc mask_of(int64_t expert) const {
    if (mask != nullptr) return mask[expert];
    if (!draw) return Acc(1);
    const uint64_t seed = philox.seed_ptr != nullptr ? static_cast<uint64_t>(*philox.seed_ptr) : philox.seed;
    const uint64_t offset =
        philox.offset + (philox.offset_ptr != nullptr ? static_cast<uint64_t>(*philox.offset_ptr) : 0);
    // Experts take the place of torch's threads: another stream each, at the generator's offset.
    const uint32_t bits = alore::kernels::philox(seed, offset / 4, static_cast<uint64_t>(expert)).v[0];
    return bits < threshold ? Acc(0) : kept;
  }

  // c of a rank row; 0 for rows of padding.
  __device__ __forceinline__ Acc of(int64_t row) const {
    if (row >= rank) return Acc(0);
    return convert<Acc>(coeff[row / expert_rank]) * mask_of(row / expert_rank);
  }

  // By one block of the grid.
  __device__ __forceinline__ void write_mask() const {
    if (mask_out == nullptr) return;
    for (int64_t e = threadIdx.x; e < rank / expert_rank; e += blockDim.x) mask_out[e] = mask_of(e);
  }
};

template <typename Factor>
struct PackArgs {
  int64_t in_features, out_features, rank;
  const Factor *a, *b;
  uint4* packed;
  const uint4* weight;
  uint4* extended;  // or null

  PackArgs(const LoraShape& s, Factors2 factors, void* packed, const void* weight, void* extended)
      : in_features(s.in_features),
        out_features(s.out_features),
        rank(s.rank),
        a(static_cast<const Factor*>(factors.a)),
        b(static_cast<const Factor*>(factors.b)),
        packed(static_cast<uint4*>(packed)),
        weight(static_cast<const uint4*>(weight)),
        extended(static_cast<uint4*>(extended)) {}
};

// How many there are to write: of the packed factors, then of [weight | b c] where that is wanted.
inline int64_t pack_vectors(const LoraShape& s, bool extends) {
  const int64_t width = s.in_features + lora_code_width(s.activation, s.rank);
  return (lora_operand_elements(s) + (extends ? s.out_features * width : 0)) / 8;
}

// Writes vector `index`; beyond the last, nothing. `c` is [8 * kTiles]. Index is int where all of them fit: a
// division of 64 bits is a hundred instructions.
template <typename T, typename Factor, int kTiles, typename Index>
__device__ __forceinline__ void pack_vector(const PackArgs<Factor>& p, const float* c, Index index) {
  const auto in_features = static_cast<Index>(p.in_features),
             out_features = static_cast<Index>(p.out_features), rank = static_cast<Index>(p.rank);
  const Index size_a = static_cast<Index>(lora_chunks(in_features)) * kTiles * 32,
              size_b = static_cast<Index>(lora_chunks(out_features)) * kTiles * 32;
  if (index >= 2 * (size_a + size_b)) {
    const Index at = index - 2 * (size_a + size_b), per_row = in_features / 8, columns = per_row + kTiles;
    if (p.extended == nullptr || at >= out_features * columns) return;
    const Index row = at / columns, column = at % columns;
    if (column < per_row) {
      p.extended[at] = p.weight[row * per_row + column];
      return;
    }
    float v[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const Index j = (column - per_row) * 8 + k;
      v[k] = j < rank && c[j] != 0.0f ? c[j] * convert<float>(p.b[row * rank + j]) : 0.0f;
    }
    p.extended[at] = rounded_eight<T>(v);
    return;
  }
  const bool is_a = index < 2 * size_a;
  const Index in_factor = is_a ? index : index - 2 * size_a, size = is_a ? size_a : size_b;
  const bool expands = in_factor >= size;
  const Index within = expands ? in_factor - size : in_factor;
  const int lane = static_cast<int>(within % 32);
  const int tile = static_cast<int>(within / 32 % kTiles);
  const Index first = within / (32 * kTiles) * static_cast<Index>(kChunk),
              features = is_a ? in_features : out_features;

  float v[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const FactorPlace place(expands, lane, k);
    const int j = tile * 8 + place.row;
    const Index feature = first + place.feature;
    v[k] = 0.0f;
    if (j >= rank || feature >= features) continue;
    // A to reduce x keeps masked rows, whose code the coefficients' gradient needs.
    if (is_a) {
      if (!expands || c[j] != 0.0f) v[k] = convert<float>(p.a[j * in_features + feature]);
    } else if (c[j] != 0.0f) {
      v[k] = c[j] * convert<float>(p.b[feature * rank + j]);
    }
  }
  p.packed[index] = rounded_eight<T>(v);
}

}  // namespace alore::kernels
