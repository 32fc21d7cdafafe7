// Backward of the fused ALoRE adapter for the shapes that backbones are trained with (kPipelinedShapes): the
// same results as alore_bwd.cu by a third of the instructions.
//
// The norm is folded into the products. With n = (x - mean) * rstd and base = n * weight + bias,
//   Z          = base @ down    = rstd * (x @ D - mean * sum(D)) + bias @ down,    D = weight * down
//   d(down)    = base^T dZ      = weight * (x^T R - sum_t mean_t R_t) + bias * sum_t dZ_t,    R = rstd * dZ
//   rstd * d(base) * weight     = rstd * weight * grad_out + R @ D^T
// so the tensor cores take x as it was read, by ldmatrix, and no normalised row is ever made: R and D are
// rounded to 16 bits where alore_bwd.cu rounds base, and what is subtracted for the mean is summed from the
// same rounded values, so that a large mean costs nothing.
//
// Three tiles are in shared memory: one whose results are written (`outputs`), the next, whose codes are made
// in the same phase (`codes`), and one that is on its way. A barrier, mixing over blocks, a barrier.
#include "kernels/alore_bwd.cuh"
#include "kernels/alore_tile.cuh"

namespace alore::kernels {
namespace {

template <typename T>
struct PipelinedParams {
  int64_t num_tokens;
  FactorSource factors;
  bool add_base;  // always behind a norm
  const T *grad_out, *x;
  const void *weight, *bias;
  DType affine;
  const float *mean, *rstd;
  T* grad_x;
  float* partial;  // [blocks, scale | down | up]
};

// Addresses in shared memory, in bytes.
__device__ __forceinline__ uint32_t address_of(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Four 8 x 8 matrices of 16-bit values, rows at the lanes' addresses.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(uint32_t (&m)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ uint32_t product2(uint32_t a, uint32_t b) {  // two bf16 products, rounded
  const __nv_bfloat162 v =
      __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
  return *reinterpret_cast<const uint32_t*>(&v);
}

// Values of a factor on their way from global memory: loaded together, used later.
template <int kCount>
struct FactorBatch {
  uint32_t bits[kCount];
  __device__ __forceinline__ void load(const void* source, DType type, int count) {
    const bool wide = type == DType::kFloat32;
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int i = threadIdx.x + u * blockDim.x;
      bits[u] = i < count ? factor_bits(source, wide, i) : 0;
    }
  }
  template <typename Put>
  __device__ __forceinline__ void put(DType type, int count, Put put_value) const {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int i = threadIdx.x + u * blockDim.x;
      if (i < count) put_value(i, factor_value(bits[u], type));
    }
  }
};

// Where a column's weight stands: by its group and the lane that holds it in a product's result, columns 2c
// and 2c + 1 of each of four tiles.
__device__ __forceinline__ int by_lane(int column) {
  return (column & ~31) + column % 8 / 2 * 8 + column % 32 / 8 * 2 + column % 2;
}

// Code columns of rows 2, 3, 6 and 7 of 8 change halves: fp32 codes are stored without bank conflicts.
__device__ __forceinline__ int code_column(int row, int w) { return w ^ (row & 2) << 2; }

template <typename T, int kGroups, int kRowTiles, int kItems, bool kNorm>
class PipelinedBackward {
  static constexpr PipelinedLayout kL{PipelinedShape{kGroups, kRowTiles, kItems}, kNorm};
  static constexpr int kBlocks = kPipelinedBlocks, kDim = kL.dim, kBlockDim = kL.block_dim;
  static constexpr int kPerTile = 4 * kL.splits;  // warps of a row tile
  static constexpr int kRowBytes = kL.row_stride * 2, kRowTileBytes = kTileRows * kRowBytes;
  static constexpr int kMixers = kL.threads < kL.rows * kCodeTile ? kL.threads : kL.rows * kCodeTile;

  const PipelinedParams<T>& p;
  unsigned char* shared;
  const int lane, g, c, row_tile, slot, block, first_group;  // slot: of this warp among its row tile's
  // A row of a matrix that this lane names to ldmatrix: of an operand's rows, or of an image's.
  const uint32_t row_lane, down_lane_rows, down_lane, up_lane;

  float up_sum[kItems][4][4] = {}, down_sum[kItems][4][4] = {};  // [16 code columns, 32 columns] an item
  float scale_sum[kBlocks][kBlocks] = {};                        // of code column threadIdx.x % 16
  float mean_sum[kBlocks] = {}, code_sum[kBlocks] = {};          // sum_t mean_t R_t and sum_t dZ_t

  __device__ static int warp() { return threadIdx.x / 32; }
  template <typename U>
  __device__ U* at(int offset) const {
    return reinterpret_cast<U*>(shared + offset);
  }

 public:
  __device__ PipelinedBackward(const PipelinedParams<T>& params, unsigned char* memory)
      : p(params),
        shared(memory),
        lane(threadIdx.x % 32),
        g(lane / 4),
        c(lane % 4),
        row_tile(warp() / kPerTile),
        slot(warp() % kPerTile),
        block(slot / kL.splits),
        first_group(slot * kItems),
        row_lane((lane % 16) * kRowBytes + lane / 16 * 16),
        down_lane_rows(address_of(memory + kL.down) + (lane % 16) * kL.down_stride * 2 + lane / 16 * 16),
        down_lane(address_of(memory + kL.down) + (lane / 16 * 8 + lane % 8) * kL.down_stride * 2 +
                  lane / 8 % 2 * 16),
        up_lane(address_of(memory + kL.up) + (lane / 16 * 8 + lane % 8) * kL.up_stride * 2 +
                lane / 8 % 2 * 16) {}

  __device__ static int64_t tiles(int64_t num_tokens) { return (num_tokens + kL.rows - 1) / kL.rows; }

  // Rows past the end arrive as zeros, gradient, mean and rstd included: they add nothing anywhere.
  __device__ __forceinline__ void load(int64_t tile, int stage) const {
    if (tile < tiles(p.num_tokens)) {
      constexpr int kPieces = kDim / 8, kStep = kL.threads / kPieces;  // rows that one pass copies
      static_assert(kL.threads % kPieces == 0 && kL.rows % kStep == 0);
      const int row = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
      const int64_t first = tile * kL.rows;
      unsigned char* to = shared + kL.stages + stage + row * kRowBytes + piece * 16;
      const int64_t from = (first + row) * kDim + piece * 8;
      const int live_rows = static_cast<int>(min(p.num_tokens - first, static_cast<int64_t>(kL.rows))) - row;
#pragma unroll
      for (int i = 0; i < kL.rows; i += kStep) {
        const bool live = i < live_rows;
        const int64_t element = live ? from + i * kDim : 0;
        copy_async_16(to + i * kRowBytes, p.x + element, live);
        copy_async_16(to + kL.grad + i * kRowBytes, p.grad_out + element, live);
      }
      if (kNorm && threadIdx.x < 2 * kL.rows) {
        const int i = threadIdx.x % kL.rows;
        const bool live = first + i < p.num_tokens, is_mean = threadIdx.x < kL.rows;
        copy_async_4(shared + kL.stages + stage + (is_mean ? kL.mean : kL.rstd) + i * 4,
                     (is_mean ? p.mean : p.rstd) + (live ? first + i : 0), live);
      }
    }
    copy_async_commit();
  }

  // The factors' images. All values are on their way before the first is used.
  __device__ __forceinline__ void prepare() {
    constexpr int kFactors = ceil_div(kCodeTile * kBlockDim, kL.threads),
                  kColumns = ceil_div(kDim, kL.threads);
    const FactorSource& f = p.factors;
    const int width = f.num_experts * f.rank, factor_size = width * kBlockDim;
    const AdapterDims dims(kBlocks, kBlockDim, width);
    FactorBatch<kFactors> down_values, up_values;
    FactorBatch<1> scale_values;
    FactorBatch<kColumns> weights, biases;
    up_values.load(f.up, f.type, factor_size);
    down_values.load(f.down, f.type, factor_size);
    scale_values.load(f.scale, f.type, f.num_experts * kBlocks * kBlocks);
    if (kNorm && p.weight != nullptr) weights.load(p.weight, p.affine, kDim);
    if (kNorm && p.bias != nullptr) biases.load(p.bias, p.affine, kDim);

    auto *down = at<T>(kL.down), *up = at<T>(kL.up);
    auto *weight = at<float>(kL.weight), *mixing = at<float>(kL.mixing);
    // What bias @ down is made of lies where the codes will.
    auto *plain_down = at<float>(kL.code), *bias = plain_down + kCodeTile * kBlockDim;
    static_assert(!kNorm || (kCodeTile * kBlockDim + kDim) * 4 <= 2 * kL.warps * kTileRows * kCodeTile * 4);
    fill_zero(shared, kL.weight);
    for (int i = threadIdx.x; i < kCodeTile * PipelinedLayout::kMixingStride; i += blockDim.x)
      mixing[i] = 0.0f;
    if constexpr (kNorm) {
      for (int i = threadIdx.x; i < kCodeTile * kBlockDim; i += blockDim.x) plain_down[i] = 0.0f;
      auto* weight16 = at<T>(kL.weight16);
      const auto put_weight = [&](int i, float v) {
        weight[by_lane(i)] = v;
        weight16[by_lane(i)] = convert<T>(v);
      };
      if (p.weight != nullptr) {
        weights.put(p.affine, kDim, put_weight);
      } else {
        for (int i = threadIdx.x; i < kDim; i += blockDim.x) put_weight(i, 1.0f);
      }
      if (p.bias != nullptr) biases.put(p.affine, kDim, [&](int i, float v) { bias[i] = v; });
    }
    __syncthreads();
    const UpPlace up_place(dims);
    up_values.put(f.type, factor_size, [&](int i, float v) {
      const CodePlace place = up_place(i);
      up[place.w * kL.up_stride + place.j] = convert<T>(v);
    });
    const DownPlace down_place(dims, f.rank);
    down_values.put(f.type, factor_size, [&](int i, float v) {
      const CodePlace place = down_place(i);
      T* to = down + place.w * kL.down_stride + place.j;
      if constexpr (kNorm) {
        plain_down[place.w * kBlockDim + place.j] = v;
#pragma unroll
        for (int a = 0; a < kBlocks; ++a)
          to[a * kBlockDim] = convert<T>(weight[by_lane(a * kBlockDim + place.j)] * v);
      } else {
        *to = convert<T>(v);
      }
    });
    scale_values.put(f.type, f.num_experts * kBlocks * kBlocks, [&](int i, float v) {
      const int e = i / (kBlocks * kBlocks), ab = i % (kBlocks * kBlocks);
      for (int k = 0; k < f.rank; ++k) mixing[(e * f.rank + k) * PipelinedLayout::kMixingStride + ab] = v;
    });
    __syncthreads();
    if constexpr (kNorm) {
      // Four threads a sum over a block's columns.
      static_assert(kL.threads >= kCodeTile * kBlocks * 4 && kBlockDim % 32 == 0);
      if (threadIdx.x < kCodeTile * kBlocks * 4) {
        const int q = threadIdx.x % 4, w = threadIdx.x / 4 % kCodeTile, a = threadIdx.x / (4 * kCodeTile);
        const T* row = down + w * kL.down_stride + a * kBlockDim;
        float sum = 0.0f, of_bias = 0.0f;
#pragma unroll 2
        for (int j = q * 8; j < kBlockDim; j += 32) {
          const Eight d = shared8(row + j);
#pragma unroll
          for (int e = 0; e < 8; ++e) sum += d.v[e];
          if (p.bias != nullptr) {
            const Eight o = shared8(bias + a * kBlockDim + j), v = shared8(plain_down + w * kBlockDim + j);
#pragma unroll
            for (int e = 0; e < 8; ++e) of_bias += o.v[e] * v.v[e];
          }
        }
        sum = row_sum(sum);
        of_bias = row_sum(of_bias);
        if (q == 0) {
          at<float>(kL.down_mean)[w * kBlocks + a] = sum;
          at<float>(kL.down_bias)[w * kBlocks + a] = of_bias;
        }
      }
      __syncthreads();
    }
  }

  // This warp's share of x @ D and dY @ up^T, and of the sums over a row that the norm's gradient needs: of
  // weight * dY, and of x * weight * dY as the diagonal of a product of rows.
  __device__ __forceinline__ void codes(int stage) const {
    const uint32_t x_at =
        address_of(shared + kL.stages) + stage + row_tile * kRowTileBytes + row_lane + first_group * 64;
    float z[2][4] = {}, dh[2][4] = {}, sum[4] = {}, gram0[4] = {}, gram1[4] = {};
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int column = (first_group + k) * kGroupColumns, local = column - block * kBlockDim;
      uint4 weights{};
      if constexpr (kNorm) weights = load_shared_16(at<T>(kL.weight16) + column + c * 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t x[4], grad[4], b[4];
        load_matrices(x, x_at + k * 64 + half * 32);
        load_matrices(grad, x_at + kL.grad + k * 64 + half * 32);
        load_matrices(b, down_lane + (kNorm ? column : local) * 2 + half * 32);
        mma<T>(z[0], x, b[0], b[1]);
        mma<T>(z[1], x, b[2], b[3]);
        load_matrices(b, up_lane + local * 2 + half * 32);
        mma<T>(dh[0], grad, b[0], b[1]);
        mma<T>(dh[1], grad, b[2], b[3]);
        if constexpr (kNorm) {
          const uint32_t left = half == 0 ? weights.x : weights.z, right = half == 0 ? weights.y : weights.w;
          const uint32_t weighted[4] = {product2(grad[0], left), product2(grad[1], left),
                                        product2(grad[2], right), product2(grad[3], right)};
          constexpr uint32_t kOnes = 0x3f803f80u;  // bf16
          mma<T>(sum, weighted, kOnes, kOnes);
          mma<T>(gram0, weighted, x[0], x[2]);
          mma<T>(gram1, weighted, x[1], x[3]);
        }
      }
    }
    float* code = at<float>(kL.code) + warp() * kTileRows * kCodeTile;
    float* grad_mixed = at<float>(kL.grad_mixed) + warp() * kTileRows * kCodeTile;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int to = g * kCodeTile + code_column(g, n * 8 + 2 * c);
      *reinterpret_cast<float2*>(code + to) = {z[n][0], z[n][1]};
      *reinterpret_cast<float2*>(code + to + 8 * kCodeTile) = {z[n][2], z[n][3]};
      *reinterpret_cast<float2*>(grad_mixed + to) = {dh[n][0], dh[n][1]};
      *reinterpret_cast<float2*>(grad_mixed + to + 8 * kCodeTile) = {dh[n][2], dh[n][3]};
    }
    if (kNorm && c == g / 2) {  // this lane has the diagonals' entries g
      auto* row_sums = at<float2>(kL.row_sums) + warp() * kTileRows;
      row_sums[g] = {sum[0], g % 2 ? gram0[1] : gram0[0]};
      row_sums[g + 8] = {sum[2], g % 2 ? gram1[3] : gram1[2]};
    }
  }

  // H and dZ of a code column of a row, a thread each; d(scale), and what the norm's gradient takes from
  // them.
  __device__ __forceinline__ void mixing(int stage) {
    const auto *code = at<float>(kL.code), *grad_mixed = at<float>(kL.grad_mixed);
    const auto* means = reinterpret_cast<const float*>(shared + kL.stages + stage + kL.mean);
    const auto* rstds = reinterpret_cast<const float*>(shared + kL.stages + stage + kL.rstd);
    const int w = threadIdx.x % kCodeTile;
#pragma unroll
    for (int first = 0; first < kL.rows * kCodeTile; first += kL.threads) {
      const int row = (first + static_cast<int>(threadIdx.x)) / kCodeTile, tile = row / kTileRows,
                t = row % kTileRows;
      if (kL.threads > kMixers && row >= kL.rows) break;
      const float mean = kNorm ? means[row] : 0.0f, rstd = kNorm ? rstds[row] : 1.0f;
      float z[kBlocks] = {}, dh[kBlocks] = {};
      const int from = (tile * kPerTile * kTileRows + t) * kCodeTile + code_column(t, w);
#pragma unroll
      for (int a = 0; a < kBlocks; ++a) {
#pragma unroll
        for (int s = 0; s < kL.splits; ++s) {
          z[a] += code[from + (a * kL.splits + s) * kTileRows * kCodeTile];
          dh[a] += grad_mixed[from + (a * kL.splits + s) * kTileRows * kCodeTile];
        }
      }
      float4 down_sum_of{}, down_bias_of{};
      if constexpr (kNorm) {
        down_sum_of = at<float4>(kL.down_mean)[w];
        down_bias_of = at<float4>(kL.down_bias)[w];
      }
      const float column_sum[4] = {down_sum_of.x, down_sum_of.y, down_sum_of.z, down_sum_of.w};
      const float column_bias[4] = {down_bias_of.x, down_bias_of.y, down_bias_of.z, down_bias_of.w};
      float normalised_z[kBlocks];
#pragma unroll
      for (int a = 0; a < kBlocks; ++a) {
        normalised_z[a] = kNorm ? rstd * (z[a] - mean * column_sum[a]) : z[a];
        z[a] = normalised_z[a] + column_bias[a];
      }
      float h[kBlocks] = {}, dz[kBlocks] = {};
#pragma unroll
      for (int a = 0; a < kBlocks; ++a) {
        const float4 s4 = at<float4>(kL.mixing)[w * (PipelinedLayout::kMixingStride / 4) + a];
        const float s[kBlocks] = {s4.x, s4.y, s4.z, s4.w};
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
          h[b] += s[b] * z[a];
          dz[a] += s[b] * dh[b];
          scale_sum[a][b] += z[a] * dh[b];
        }
      }
      float of_weight = 0.0f, of_normalised = 0.0f;
      T* mixed = at<T>(kL.mixed) + (tile * kBlocks * kTileRows + t) * PipelinedLayout::kCodeStride + w;
      T* grad_code =
          at<T>(kL.grad_code) + (tile * kBlocks * kTileRows + t) * PipelinedLayout::kCodeStride + w;
#pragma unroll
      for (int a = 0; a < kBlocks; ++a) {
        const T scaled = convert<T>(kNorm ? rstd * dz[a] : dz[a]);
        mixed[a * kTileRows * PipelinedLayout::kCodeStride] = convert<T>(h[a]);
        grad_code[a * kTileRows * PipelinedLayout::kCodeStride] = scaled;
        if constexpr (kNorm) {
          const float r = convert<float>(scaled);
          mean_sum[a] += mean * r;
          code_sum[a] += dz[a];
          of_weight += r * column_sum[a];
          of_normalised += r * normalised_z[a];
        }
      }
      if constexpr (kNorm) {
        // Means over a row of g = rstd * weight * d(base) and of g * n: the lanes of a row have its code
        // columns and, one each, the warps' shares.
        if (w < kPerTile) {
          const float2 share = at<float2>(kL.row_sums)[(tile * kPerTile + w) * kTileRows + t];
          of_weight += rstd * share.x;
          of_normalised += rstd * rstd * (share.y - mean * share.x);
        }
#pragma unroll
        for (int offset = 8; offset > 0; offset /= 2) {
          of_weight += __shfl_xor_sync(0xffffffffu, of_weight, offset);
          of_normalised += __shfl_xor_sync(0xffffffffu, of_normalised, offset);
        }
        if (w == 0) {  // d(x) = rstd * weight * d(base) - slope * x - offset
          const float slope = rstd * of_normalised * (1.0f / kDim);
          at<float4>(kL.row_terms)[row] = {rstd, -slope, mean * slope - of_weight * (1.0f / kDim), 0.0f};
        }
      }
    }
  }

  // d(up) and d(down) of this warp's columns, and d(x), which leaves by way of grad_out's place in the stage.
  __device__ __forceinline__ void outputs(int64_t tile, int stage) {
    unsigned char* const rows = shared + kL.stages + stage + row_tile * kRowTileBytes;
    const uint32_t x_at = address_of(rows) + row_lane + first_group * 64;
    const int codes_at = (row_tile * kBlocks + block) * kTileRows * PipelinedLayout::kCodeStride;
    uint32_t h[4], r[4], r_rows[4];
    load_a_transposed(h, at<T>(kL.mixed) + codes_at, PipelinedLayout::kCodeStride, lane);
    load_a_transposed(r, at<T>(kL.grad_code) + codes_at, PipelinedLayout::kCodeStride, lane);
    load_a(r_rows, at<T>(kL.grad_code) + codes_at, PipelinedLayout::kCodeStride, lane);
    float4 terms0{1.0f, 0.0f, 0.0f, 0.0f}, terms1 = terms0;
    if constexpr (kNorm) {
      terms0 = at<float4>(kL.row_terms)[row_tile * kTileRows + g];
      terms1 = at<float4>(kL.row_terms)[row_tile * kTileRows + g + 8];
    }
    const float base_share = kNorm || p.add_base ? 1.0f : 0.0f;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int column = (first_group + k) * kGroupColumns;
      Eight weight;
      if constexpr (kNorm) weight = shared8(at<float>(kL.weight) + column + c * 8);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t here = x_at + k * 64 + half * 32;
        uint32_t b[4];
        load_matrices_transposed(b, here + kL.grad);
        mma<T>(up_sum[k][2 * half], h, b[0], b[1]);
        mma<T>(up_sum[k][2 * half + 1], h, b[2], b[3]);
        load_matrices_transposed(b, here);
        mma<T>(down_sum[k][2 * half], r, b[0], b[1]);
        mma<T>(down_sum[k][2 * half + 1], r, b[2], b[3]);
        if (p.grad_x == nullptr) continue;

        uint32_t x[4], grad[4];
        load_matrices(grad, here + kL.grad);
        if constexpr (kNorm) load_matrices(x, here);
        const int image_column = kNorm ? column : column - block * kBlockDim;
        load_matrices_transposed(b, down_lane_rows + image_column * 2 + half * 32);
        T* to = reinterpret_cast<T*>(rows + kL.grad) + g * kL.row_stride + column + half * 16 + 2 * c;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float out[4];
          const float2 grad0 = unpack2<T>(grad[2 * n]), grad1 = unpack2<T>(grad[2 * n + 1]);
          if constexpr (kNorm) {
            const float2 x0 = unpack2<T>(x[2 * n]), x1 = unpack2<T>(x[2 * n + 1]);
            const float w0 = weight.v[(2 * half + n) * 2], w1 = weight.v[(2 * half + n) * 2 + 1];
            out[0] = grad0.x * w0 * terms0.x + (x0.x * terms0.y + terms0.z);
            out[1] = grad0.y * w1 * terms0.x + (x0.y * terms0.y + terms0.z);
            out[2] = grad1.x * w0 * terms1.x + (x1.x * terms1.y + terms1.z);
            out[3] = grad1.y * w1 * terms1.x + (x1.y * terms1.y + terms1.z);
          } else {
            out[0] = grad0.x * base_share, out[1] = grad0.y * base_share;
            out[2] = grad1.x * base_share, out[3] = grad1.y * base_share;
          }
          mma<T>(out, r_rows, b[2 * n], b[2 * n + 1]);
          *reinterpret_cast<uint32_t*>(to + n * 8) = pack2<T>(out[0], out[1]);
          *reinterpret_cast<uint32_t*>(to + 8 * kL.row_stride + n * 8) = pack2<T>(out[2], out[3]);
        }
      }
    }
    if (p.grad_x == nullptr) return;
    __syncwarp();
    constexpr int kPieces = kItems * 4, kStep = 32 / kPieces;  // 16-byte pieces of a row; rows at a time
    const int row = lane / kPieces, piece = lane % kPieces;
    const unsigned char* from = rows + kL.grad + row * kRowBytes + first_group * 64 + piece * 16;
    const int64_t first_row = tile * kL.rows + row_tile * kTileRows + row;
    T* to = p.grad_x + first_row * kDim + first_group * kGroupColumns + piece * 8;
#pragma unroll
    for (int i = 0; i < kTileRows; i += kStep) {
      const uint4 v = load_shared_16(from + i * kRowBytes);
      if (first_row + i < p.num_tokens) store_16(to + i * kDim, v);
    }
  }

  // The block's sums, added in a fixed order, in the factors' own layout.
  __device__ __forceinline__ void finish() {
    auto* sums = at<float>(kL.sums);  // [down | up][row tile, block][16][sum_stride]
    constexpr int kSlots = kRowTiles * kBlocks, kSlotSize = kCodeTile * kL.sum_stride;
    const int own = (row_tile * kBlocks + block) * kSlotSize;
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      const int local = (first_group + k) * kGroupColumns - block * kBlockDim + 2 * c;
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
        for (int upper = 0; upper < 2; ++upper) {
          const int to = own + (g + upper * 8) * kL.sum_stride + local + tile * 8;
          *reinterpret_cast<float2*>(sums + to) = {down_sum[k][tile][2 * upper],
                                                   down_sum[k][tile][2 * upper + 1]};
          *reinterpret_cast<float2*>(sums + kSlots * kSlotSize + to) = {up_sum[k][tile][2 * upper],
                                                                        up_sum[k][tile][2 * upper + 1]};
        }
      }
    }
    auto* of_threads = at<float>(kL.scale_sums);  // [24, mixers]
    if (threadIdx.x < kMixers) {
#pragma unroll
      for (int a = 0; a < kBlocks; ++a) {
#pragma unroll
        for (int b = 0; b < kBlocks; ++b)
          of_threads[(a * kBlocks + b) * kMixers + threadIdx.x] = scale_sum[a][b];
        of_threads[(16 + a) * kMixers + threadIdx.x] = mean_sum[a];
        of_threads[(20 + a) * kMixers + threadIdx.x] = code_sum[a];
      }
    }
    __syncthreads();
    const FactorSource& f = p.factors;
    const int scale_size = f.num_experts * kBlocks * kBlocks,
              factor_size = f.num_experts * f.rank * kBlockDim;
    float* out = p.partial + static_cast<int64_t>(blockIdx.x) * (scale_size + 2 * factor_size);
    auto* totals = at<float>(kL.totals);  // [mean_sum | code_sum][4][16]
    if (kNorm && threadIdx.x < 2 * kBlocks * kCodeTile) {
      const float* column = of_threads + (16 + threadIdx.x / kCodeTile) * kMixers + threadIdx.x % kCodeTile;
      float total = 0.0f;
#pragma unroll 8
      for (int i = 0; i < kMixers; i += kCodeTile) total += column[i];
      totals[threadIdx.x] = total;
    }
    // d(scale): an expert's columns over all rows that the threads stood for, a warp an entry.
    const FastDivide by_rank(f.rank);
#pragma unroll 1
    for (int i = warp(); i < scale_size; i += kL.warps) {
      const int e = i / (kBlocks * kBlocks);
      const float* entry = of_threads + i % (kBlocks * kBlocks) * kMixers + e * f.rank;
      float total = 0.0f;
      for (int q = lane; q < kMixers / kCodeTile * f.rank; q += 32) {
        const int row = by_rank.quotient(q);
        total += entry[row * kCodeTile + q - row * f.rank];
      }
      total = warp_sum(total);
      if (lane == 0) out[i] = total;
    }
    __syncthreads();

    const AdapterDims dims(kBlocks, kBlockDim, f.num_experts * f.rank);
    const DownPlace down_place(dims, f.rank);
    const UpPlace up_place(dims);
    const auto affine_at = [&](const void* vector, int i) {
      return factor_value(factor_bits(vector, p.affine == DType::kFloat32, i), p.affine);
    };
#pragma unroll 1
    for (int i = threadIdx.x; i < factor_size; i += kL.threads) {
      const CodePlace of_down = down_place(i), of_up = up_place(i);
      const float* up_at = sums + kSlots * kSlotSize + of_up.w * kL.sum_stride + of_up.j;
      const float* down_at = sums + of_down.w * kL.sum_stride + of_down.j;
      float up = 0.0f, down = 0.0f;
#pragma unroll
      for (int a = 0; a < kBlocks; ++a) {
        float of_block = 0.0f;
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
          up += up_at[(tile * kBlocks + a) * kSlotSize];
          of_block += down_at[(tile * kBlocks + a) * kSlotSize];
        }
        if constexpr (kNorm) {
          of_block -= totals[a * kCodeTile + of_down.w];
          const int column = a * kBlockDim + of_down.j;
          if (p.weight != nullptr) of_block *= affine_at(p.weight, column);
          if (p.bias != nullptr)
            of_block += affine_at(p.bias, column) * totals[(kBlocks + a) * kCodeTile + of_down.w];
        }
        down += of_block;
      }
      out[scale_size + i] = down;
      out[scale_size + factor_size + i] = up;
    }
  }

  __device__ __forceinline__ void run() {
    constexpr int kStage = kL.stage_bytes;
    const int64_t count = tiles(p.num_tokens), step = gridDim.x;
    int64_t tile = blockIdx.x;
    load(tile, 0);
    load(tile + step, kStage);
    prepare();
    int now = 0, next = kStage, last = 2 * kStage;  // stages of this tile, of the next and of the one after
    copy_async_wait<1>();
    __syncthreads();
    codes(now);
    __syncthreads();
    mixing(now);
    copy_async_wait<0>();
    __syncthreads();
#pragma unroll 1
    for (; tile < count; tile += step) {
      load(tile + 2 * step, last);
      outputs(tile, now);
      const bool more = tile + step < count;
      if (more) codes(next);
      __syncthreads();
      if (more) mixing(next);
      copy_async_wait<0>();
      __syncthreads();
      const int free = now;
      now = next;
      next = last;
      last = free;
    }
    finish();
  }
};

template <typename T, int kGroups, int kRowTiles, int kItems, bool kNorm>
__global__ void __launch_bounds__(PipelinedLayout(PipelinedShape{kGroups, kRowTiles, kItems}, kNorm).threads,
                                  1)
    alore_backward_pipelined_kernel(const __grid_constant__ PipelinedParams<T> p) {
  extern __shared__ __align__(128) unsigned char shared[];
  PipelinedBackward<T, kGroups, kRowTiles, kItems, kNorm>(p, shared).run();
}

template <typename T, int kGroups, int kRowTiles, int kItems, bool kNorm>
void launch(const CudaContext& context, const AloreBackwardPlan& plan, const PipelinedParams<T>& params) {
  const auto kernel = alore_backward_pipelined_kernel<T, kGroups, kRowTiles, kItems, kNorm>;
  static SharedMemoryGrants grants;
  grants.allow(reinterpret_cast<const void*>(kernel), plan.shared_bytes, "alore_backward");
  kernel<<<plan.blocks, 32 * plan.warps, plan.shared_bytes, context.stream>>>(params);
  check_launch("alore_backward");
}

template <typename T, bool kNorm>
void launch_shape(const CudaContext& context, const AloreShape& s, const AloreBackwardPlan& plan,
                  const AloreBackwardArgs& a) {
  const PipelinedParams<T> params{s.num_tokens,
                                  factors_of(s, a.adapter),
                                  s.add_base,
                                  static_cast<const T*>(a.grad_out),
                                  static_cast<const T*>(a.sum),
                                  a.norm.weight,
                                  a.norm.bias,
                                  s.affine,
                                  a.mean,
                                  a.rstd,
                                  static_cast<T*>(a.grad_x),
                                  static_cast<float*>(a.workspace)};
  switch (s.embed_dim() / kGroupColumns) {
    case 4:
      return launch<T, 4, 4, 1, kNorm>(context, plan, params);
    case 8:
      return launch<T, 8, 2, 1, kNorm>(context, plan, params);
    case 12:
      return launch<T, 12, 1, 1, kNorm>(context, plan, params);
    case 16:
      return launch<T, 16, 1, 1, kNorm>(context, plan, params);
    default:
      return launch<T, 24, 1, 2, kNorm>(context, plan, params);
  }
}

}  // namespace

void alore_backward_pipelined(const CudaContext& context, const AloreShape& s, const AloreBackwardPlan& plan,
                              const AloreBackwardArgs& a) {
  if (s.norm) return launch_shape<__nv_bfloat16, true>(context, s, plan, a);
  if (s.output == DType::kBFloat16) return launch_shape<__nv_bfloat16, false>(context, s, plan, a);
  launch_shape<__half, false>(context, s, plan, a);
}

}  // namespace alore::kernels
