#include "kernels/kron_cpu.h"

#include <algorithm>
#include <vector>

#include "kernels/layer_norm.h"
#include "kernels/simd_cpu.h"

namespace alore::kernels {
namespace {

using simd::kLanes;
using simd::load;
using simd::multiply;
using simd::store;
using simd::Vec;

// Scale and its gradient, spread over an expert's rank, lie as [width / 8, s_in, s_out, 8]: mixing walks all
// pairs of blocks for one vector of the width, and at 32 experts only such a slice of them stays in cache.
constexpr int64_t kGroup = 8;

// Codes' width with room for whole vectors of either type; the padding columns are never summed over.
int64_t padded_width(const KronShape& s) { return (s.width() + kGroup - 1) / kGroup * kGroup; }

struct PackedLayout {
  int64_t width, spread, down, down_t, up, up_t, size;

  explicit PackedLayout(const KronShape& s) : width(padded_width(s)) {
    spread = 0;  // [width / 8, s_in, s_out, 8], scale repeated over an expert's rank
    down = spread + s.s_in * s.s_out * width;  // [p_in, width]
    up_t = down + s.p_in * width;              // [p_out, width]
    down_t = up_t + s.p_out * width;           // [width, p_in]
    up = down_t + width * s.p_in;              // [width, p_out]
    size = up + width * s.p_out;
  }
};

struct PartialLayout {
  int64_t width, spread, down, up, weight, bias, size;

  explicit PartialLayout(const KronShape& s) : width(padded_width(s)) {
    spread = 0;                                // [width / 8, s_in, s_out, 8]
    down = spread + s.s_in * s.s_out * width;  // [p_in, width]
    up = down + s.p_in * width;                // [s.width(), p_out]
    weight = up + s.width() * s.p_out;         // [embed_dim]
    bias = weight + s.s_in * s.p_in;           // [embed_dim]
    size = bias + s.s_in * s.p_in;
  }
};

struct ScratchLayout {
  int64_t code, mixed, grad_mixed, grad_code, normed, grad_normed, size;

  explicit ScratchLayout(const KronShape& s) {
    const int64_t chunk = kron_chunk_tokens_cpu(s), width = padded_width(s), dim = s.s_in * s.p_in;
    code = 0;                                          // [chunk * s_in, width]
    mixed = code + chunk * s.s_in * width;             // [chunk * s_out, width]
    grad_mixed = mixed + chunk * s.s_out * width;      // [chunk * s_out, width]
    grad_code = grad_mixed + chunk * s.s_out * width;  // [chunk * s_in, width]
    normed = grad_code + chunk * s.s_in * width;       // [chunk, embed_dim]
    grad_normed = normed + chunk * dim;                // [chunk, embed_dim]
    size = grad_normed + chunk * dim;
  }
};

// out[t, j, :] = sum_i spread[i * stride_i + j * stride_j + :] * in[t, i, :] for kTokens tokens, kBlocks
// blocks j and one vector of the width.
template <typename T, int kTokens, int kBlocks>
inline void mix_tile(const T* in, const T* spread, int64_t stride_i, int64_t stride_j, int64_t s_in,
                     int64_t s_out, int64_t width, T* out) {
  Vec<T> sums[kTokens][kBlocks] = {};
  for (int64_t i = 0; i < s_in; ++i) {
    Vec<T> codes[kTokens];
#pragma GCC unroll 3
    for (int t = 0; t < kTokens; ++t) codes[t] = load(in + (t * s_in + i) * width);
#pragma GCC unroll 4
    for (int j = 0; j < kBlocks; ++j) {
      const Vec<T> scale = load(spread + i * stride_i + j * stride_j);
#pragma GCC unroll 3
      for (int t = 0; t < kTokens; ++t) sums[t][j] += scale * codes[t];
    }
  }
#pragma GCC unroll 3
  for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 4
    for (int j = 0; j < kBlocks; ++j) store(out + (t * s_out + j) * width, sums[t][j]);
  }
}

template <typename T>
void mix(int64_t tokens, const T* in, const T* spread, int64_t stride_i, int64_t stride_j, int64_t s_in,
         int64_t s_out, int64_t width, T* out) {
  constexpr int kTokens = 3, kBlocks = 4;
  for (int64_t v = 0; v < width; v += kLanes<T>) {
    const T* slice = spread + v / kGroup * kGroup * s_in * s_out + v % kGroup;
    for (int64_t t = 0; t < tokens; t += kTokens) {
      simd::with_constant<kTokens>(std::min<int64_t>(tokens - t, kTokens), [&](auto count) {
        for (int64_t j = 0; j < s_out; j += kBlocks) {
          simd::with_constant<kBlocks>(std::min<int64_t>(s_out - j, kBlocks), [&](auto blocks) {
            mix_tile<T, count(), blocks()>(in + t * s_in * width + v, slice + j * stride_j, stride_i,
                                           stride_j, s_in, s_out, width, out + (t * s_out + j) * width + v);
          });
        }
      });
    }
  }
}

// sums[a, b, :] += sum_t code[t, a, :] * grad_mixed[t, b, :] for kIn blocks a, kOut blocks b and one vector.
template <typename T, int kIn, int kOut>
inline void spread_grad_tile(int64_t tokens, const T* code, const T* grad_mixed, int64_t s_in, int64_t s_out,
                             int64_t width, T* sums) {
  Vec<T> acc[kIn][kOut];
#pragma GCC unroll 4
  for (int a = 0; a < kIn; ++a) {
#pragma GCC unroll 2
    for (int b = 0; b < kOut; ++b) acc[a][b] = load(sums + (a * s_out + b) * kGroup);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    Vec<T> grads[kOut];
#pragma GCC unroll 2
    for (int b = 0; b < kOut; ++b) grads[b] = load(grad_mixed + (t * s_out + b) * width);
#pragma GCC unroll 4
    for (int a = 0; a < kIn; ++a) {
      const Vec<T> z = load(code + (t * s_in + a) * width);
#pragma GCC unroll 2
      for (int b = 0; b < kOut; ++b) acc[a][b] += z * grads[b];
    }
  }
#pragma GCC unroll 4
  for (int a = 0; a < kIn; ++a) {
#pragma GCC unroll 2
    for (int b = 0; b < kOut; ++b) store(sums + (a * s_out + b) * kGroup, acc[a][b]);
  }
}

template <typename T>
void add_spread_grad(int64_t tokens, const T* code, const T* grad_mixed, int64_t s_in, int64_t s_out,
                     int64_t width, T* sums) {
  constexpr int kIn = 4, kOut = 2;
  for (int64_t v = 0; v < width; v += kLanes<T>) {
    T* slice = sums + v / kGroup * kGroup * s_in * s_out + v % kGroup;
    for (int64_t a = 0; a < s_in; a += kIn) {
      simd::with_constant<kIn>(std::min<int64_t>(s_in - a, kIn), [&](auto ins) {
        for (int64_t b = 0; b < s_out; b += kOut) {
          simd::with_constant<kOut>(std::min<int64_t>(s_out - b, kOut), [&](auto outs) {
            spread_grad_tile<T, ins(), outs()>(tokens, code + a * width + v, grad_mixed + b * width + v, s_in,
                                               s_out, width, slice + (a * s_out + b) * kGroup);
          });
        }
      });
    }
  }
}

}  // namespace

int64_t kron_chunk_tokens_cpu(const KronShape& s) {
  // Four buffers of 48 KiB (in fp32) beside the activations' own rows: half of a second-level cache of 512
  // KiB.
  const int64_t widest = std::max(
      {s.s_in * s.p_in, s.s_out * s.p_out, s.s_in * padded_width(s), s.s_out * padded_width(s), int64_t{1}});
  return std::clamp<int64_t>(12288 / widest, 6, 64);
}

int64_t kron_packed_size_cpu(const KronShape& s) { return PackedLayout(s).size; }
int64_t kron_scratch_size_cpu(const KronShape& s) { return ScratchLayout(s).size; }
int64_t kron_partial_size_cpu(const KronShape& s) { return PartialLayout(s).size; }

int64_t kron_partials_cpu(const KronShape& s) {
  // At least 48 tokens each, so that adding the partial sums up costs little; and 16 MiB (in fp32) for all of
  // them.
  const int64_t most = std::clamp<int64_t>((int64_t{4} << 20) / kron_partial_size_cpu(s), 1, 64);
  return std::clamp<int64_t>(s.num_tokens / 48, 1, most);
}

template <typename T>
void kron_pack_cpu(const KronShape& s, const T* scale, const T* down, const T* up, T* packed) {
  const PackedLayout at(s);
  const int64_t blocks = s.s_in * s.s_out;
  std::fill_n(packed, at.size, T(0));
  for (int64_t e = 0; e < s.num_experts; ++e) {
    for (int64_t ab = 0; ab < blocks; ++ab) {
      for (int64_t k = e * s.rank; k < (e + 1) * s.rank; ++k) {
        packed[at.spread + (k / kGroup * blocks + ab) * kGroup + k % kGroup] = scale[e * blocks + ab];
      }
    }
    for (int64_t i = 0; i < s.p_in; ++i) {
      for (int64_t k = 0; k < s.rank; ++k) {
        const T value = down[(e * s.p_in + i) * s.rank + k];
        packed[at.down + i * at.width + e * s.rank + k] = value;
        packed[at.down_t + (e * s.rank + k) * s.p_in + i] = value;
      }
    }
    for (int64_t k = e * s.rank; k < (e + 1) * s.rank; ++k) {
      for (int64_t i = 0; i < s.p_out; ++i) {
        packed[at.up_t + i * at.width + k] = packed[at.up + k * s.p_out + i] = up[k * s.p_out + i];
      }
    }
  }
}

template <typename T>
void kron_forward_cpu(const KronShape& s, const T* packed, const T* x, const KronNormCpu<T>* norm, bool beta,
                      int64_t begin, int64_t end, T* out, T* scratch) {
  const PackedLayout at(s);
  const ScratchLayout in(s);
  const int64_t chunk = kron_chunk_tokens_cpu(s), width = at.width;
  const int64_t dim_in = s.s_in * s.p_in, dim_out = s.s_out * s.p_out;
  T *code = scratch + in.code, *mixed = scratch + in.mixed;
  for (int64_t t = begin; t < end; t += chunk) {
    const int64_t tokens = std::min(chunk, end - t);
    const T* rows = x + t * dim_in;
    T* result = out + t * dim_out;
    if (norm != nullptr) {
      layer_norm_cpu<T>(rows, norm->weight, norm->bias, norm->eps, false, 0, tokens, dim_in, norm->mean + t,
                        norm->rstd + t, result);
      rows = result;
    }
    multiply<T, false>(tokens * s.s_in, width, s.p_in, rows, s.p_in, packed + at.down, width, false, code,
                       width);
    mix(tokens, code, packed + at.spread, s.s_out * kGroup, kGroup, s.s_in, s.s_out, width, mixed);
    multiply<T, false>(tokens * s.s_out, s.p_out, s.width(), mixed, width, packed + at.up, s.p_out,
                       beta || norm != nullptr, result, s.p_out);
  }
}

template <typename T>
void kron_backward_cpu(const KronShape& s, const T* packed, const T* x, const T* grad_base,
                       const T* grad_branch, const KronNormCpu<T>* norm, bool beta, bool affine,
                       int64_t begin, int64_t end, T* grad_x, T* partial, T* scratch) {
  const PackedLayout at(s);
  const PartialLayout sum(s);
  const ScratchLayout in(s);
  const int64_t chunk = kron_chunk_tokens_cpu(s), width = at.width;
  const int64_t dim_in = s.s_in * s.p_in, dim_out = s.s_out * s.p_out;
  T *code = scratch + in.code, *mixed = scratch + in.mixed;
  T *grad_mixed = scratch + in.grad_mixed, *grad_code = scratch + in.grad_code;
  std::fill_n(partial, sum.size, T(0));
  for (int64_t t = begin; t < end; t += chunk) {
    const int64_t tokens = std::min(chunk, end - t);
    const int64_t rows_in = tokens * s.s_in, rows_out = tokens * s.s_out;
    const T *source = x + t * dim_in, *rows = source, *grad = grad_branch + t * dim_out;
    if (norm != nullptr) {
      T* normed = scratch + in.normed;
      layer_norm_cpu<T>(source, norm->weight, norm->bias, 0.0, true, 0, tokens, dim_in, norm->mean + t,
                        norm->rstd + t, normed);
      rows = normed;
    }
    // The code is computed again: keeping it would cost memory for every layer between forward and backward.
    multiply<T, false>(rows_in, width, s.p_in, rows, s.p_in, packed + at.down, width, false, code, width);
    multiply<T, false>(rows_out, width, s.p_out, grad, s.p_out, packed + at.up_t, width, false, grad_mixed,
                       width);
    mix(tokens, code, packed + at.spread, s.s_out * kGroup, kGroup, s.s_in, s.s_out, width, mixed);
    mix(tokens, grad_mixed, packed + at.spread, kGroup, s.s_out * kGroup, s.s_out, s.s_in, width, grad_code);
    add_spread_grad(tokens, code, grad_mixed, s.s_in, s.s_out, width, partial + sum.spread);
    multiply<T, true>(s.width(), s.p_out, rows_out, mixed, width, grad, s.p_out, true, partial + sum.up,
                      s.p_out);
    multiply<T, true>(s.p_in, width, rows_in, rows, s.p_in, grad_code, width, true, partial + sum.down,
                      width);
    if (norm == nullptr) {
      if (grad_x == nullptr) continue;
      multiply<T, false>(rows_in, s.p_in, s.width(), grad_code, width, packed + at.down_t, s.p_in, beta,
                         grad_x + t * dim_in, s.p_in);
      continue;
    }
    if (grad_x == nullptr && !affine) continue;
    T* grad_normed = scratch + in.grad_normed;
    const T* base = grad_base + t * dim_in;
    multiply<T, false>(rows_in, s.p_in, s.width(), grad_code, width, packed + at.down_t, s.p_in, false,
                       grad_normed, s.p_in);
    if (affine) {
      layer_norm_affine_backward_cpu<T>(base, grad_normed, source, norm->mean + t, norm->rstd + t, 0, tokens,
                                        dim_in, partial + sum.weight, partial + sum.bias);
    }
    if (grad_x != nullptr) {
      layer_norm_backward_cpu<T>(base, grad_normed, source, norm->weight, norm->mean + t, norm->rstd + t, 0,
                                 tokens, dim_in, grad_x + t * dim_in);
    }
  }
}

template <typename T>
void kron_reduce_cpu(const KronShape& s, const T* partials, int64_t parts, T* grad_scale, T* grad_down,
                     T* grad_up, T* grad_weight, T* grad_bias) {
  const PartialLayout at(s);
  const auto add_up = [&](int64_t begin, int64_t count, T* total) {
    std::copy_n(partials + begin, count, total);
    for (int64_t part = 1; part < parts; ++part) {
      const T* p = partials + part * at.size + begin;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) total[i] += p[i];
    }
  };
  // A row of the low-rank gradients at a time: all partial sums of it stay in cache.
  std::vector<T> sums(at.width);
  T* row = sums.data();
  const int64_t blocks = s.s_in * s.s_out;
  std::fill_n(grad_scale, s.scale_size(), T(0));
  for (int64_t k = 0; k < s.width(); k += kGroup) {
    for (int64_t ab = 0; ab < blocks; ++ab) {
      add_up(at.spread + k * blocks + ab * kGroup, kGroup, row);
      for (int64_t l = 0; l < std::min(kGroup, s.width() - k); ++l) {
        grad_scale[(k + l) / s.rank * blocks + ab] += row[l];
      }
    }
  }
  for (int64_t i = 0; i < s.p_in; ++i) {
    add_up(at.down + i * at.width, at.width, row);
    for (int64_t e = 0; e < s.num_experts; ++e) {
      std::copy_n(row + e * s.rank, s.rank, grad_down + (e * s.p_in + i) * s.rank);
    }
  }
  add_up(at.up, s.up_size(), grad_up);
  if (grad_weight != nullptr) add_up(at.weight, s.s_in * s.p_in, grad_weight);
  if (grad_bias != nullptr) add_up(at.bias, s.s_in * s.p_in, grad_bias);
}

#define ALORE_INSTANTIATE(T)                                                                           \
  template void kron_pack_cpu<T>(const KronShape&, const T*, const T*, const T*, T*);                  \
  template void kron_forward_cpu<T>(const KronShape&, const T*, const T*, const KronNormCpu<T>*, bool, \
                                    int64_t, int64_t, T*, T*);                                         \
  template void kron_backward_cpu<T>(const KronShape&, const T*, const T*, const T*, const T*,         \
                                     const KronNormCpu<T>*, bool, bool, int64_t, int64_t, T*, T*, T*); \
  template void kron_reduce_cpu<T>(const KronShape&, const T*, int64_t, T*, T*, T*, T*, T*);
ALORE_INSTANTIATE(float)
ALORE_INSTANTIATE(double)
#undef ALORE_INSTANTIATE

}  // namespace alore::kernels
